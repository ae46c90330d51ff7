"""Every optimizer of the table with arguments under which it moves within a few steps, skipped where its package is not there."""

import importlib.util

import pytest

from library.optim.records import NOTHING, RECORDS, Record

# A step size found from 1e-6 upwards takes hundreds of steps to matter.
_STARTED = ["d0=1e-2", "growth_rate=1.02"]
ARGS = {
    "SGD": ["momentum=0.9"], "Prodigy": _STARTED, "ProdigyPlusScheduleFree": ["d0=1e-2"],
    **{name: _STARTED for name in ("DAdaptation", "DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptAdanIP", "DAdaptSGD")},
    "DAdaptLion": ["d0=1e-2"],
    "RAdam": ["betas=0.9,0.9"], "RAdamScheduleFree": ["betas=0.9,0.9"],  # the first steps go into the estimate of a variance
}
RATES = {"SGD": 0.1, "SGDNesterov": 0.1, "SGDNesterov8bit": 0.1, "ASGD": 1.0, "Adadelta": 30.0, "SGDScheduleFree": 1.0,
         "DAdaptAdaGrad": 0.3, "DAdaptSGD": 10.0}


def rate(record: Record) -> float:
    return RATES.get(record.name, 1.0 if record.own_rate else 1e-2)


def missing(record: Record) -> bool:
    return importlib.util.find_spec(record.path.split(".")[0]) is None


def param(record: Record):
    reason = f"{record.name} needs pip install {record.package} (listed in requirements.txt or requirements-dev.txt)"
    marks = [pytest.mark.skipif(missing(record), reason=reason), pytest.mark.filterwarnings("ignore:Paged optimizers:UserWarning")]
    return pytest.param(record, id=record.name, marks=marks)


ALL = [param(record) for record in RECORDS]
SEPARATE = [param(record) for record in RECORDS if record.keeps == NOTHING]
TOGETHER = [param(record) for record in RECORDS if record.keeps != NOTHING]
WITH_MODES = [param(record) for record in RECORDS if record.modes]
