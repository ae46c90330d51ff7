"""Fine-tune all weights of an SDXL model: ``accelerate launch sdxl_train.py --help``."""

import sys

from library.app import main
from library.architectures.sdxl_options import SdxlOptions
from library.config.ddpm_options import DdpmOptions
from library.config.parse import Entry

ENTRY = Entry(
    program="sdxl_train.py",
    architecture="library.architectures.sdxl",
    method="library.methods.full",
    objective_options=DdpmOptions,
    architecture_options=SdxlOptions,
    defaults={},
)

if __name__ == "__main__":
    sys.exit(main(ENTRY, sys.argv[1:]))
