"""Fine-tune all weights of Lumina-Image 2.0 or Lumina-Next: ``accelerate launch lumina_train.py --help``."""

import sys

from library.app import main
from library.architectures.lumina_options import DEFAULTS, LuminaOptions
from library.config.flow_options import FlowOptions
from library.config.parse import Entry

ENTRY = Entry(
    program="lumina_train.py",
    architecture="library.architectures.lumina",
    method="library.methods.full",
    objective_options=FlowOptions,
    architecture_options=LuminaOptions,
    defaults=DEFAULTS,
)

if __name__ == "__main__":
    sys.exit(main(ENTRY, sys.argv[1:]))
