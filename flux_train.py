"""Fine-tune all weights of a FLUX.1 model: ``accelerate launch flux_train.py --help``."""

import sys

from library.app import main
from library.architectures.flux_options import DEFAULTS, FluxOptions
from library.config.flow_options import FlowOptions
from library.config.parse import Entry

ENTRY = Entry(
    program="flux_train.py",
    architecture="library.architectures.flux",
    method="library.methods.full",
    objective_options=FlowOptions,
    architecture_options=FluxOptions,
    defaults=DEFAULTS,
)

if __name__ == "__main__":
    sys.exit(main(ENTRY, sys.argv[1:]))
