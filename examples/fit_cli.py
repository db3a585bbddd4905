"""The same from a YAML file: ``python examples/fit_cli.py fit --config examples/config.yaml``.

Techniques are ordinary callbacks for LightningCLI; put your own module and data in the place of
the two small ones.
"""

from lightning.pytorch.cli import LightningCLI

from lightning_reg.compare.data import SmallData
from lightning_reg.compare.model import SmallNet


def main(arguments: list[str] | None = None) -> LightningCLI:
    return LightningCLI(SmallNet, SmallData, save_config_callback=None, args=arguments)


if __name__ == "__main__":
    main()
