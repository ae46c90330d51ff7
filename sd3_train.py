"""Fine-tune all weights of an SD3 or SD3.5 model: ``accelerate launch sd3_train.py --help``."""

import sys

from library.app import main
from library.architectures.sd3_options import DEFAULTS, Sd3Options
from library.config.parse import Entry
from library.config.weighted_flow_options import WeightedFlowOptions

ENTRY = Entry(
    program="sd3_train.py",
    architecture="library.architectures.sd3",
    method="library.methods.full",
    objective_options=WeightedFlowOptions,
    architecture_options=Sd3Options,
    defaults=DEFAULTS,
)

if __name__ == "__main__":
    sys.exit(main(ENTRY, sys.argv[1:]))
