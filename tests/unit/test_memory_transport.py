"""The CUDA transport against a stand-in for the CUDA runtime: which stream waits for what, what is pinned, who waits."""

import contextlib
import mmap
import re
import sys
from pathlib import Path

import pytest
import torch

from library.errors import UserError
from library.memory.transport import CpuTransport, CudaTransport, Lane, _pages, open_transport
from tests.unit.memory_helpers import Run, Setting, assert_same


class Driver:
    """Records what torch.cuda is asked for; copies happen on the CPU."""

    def __init__(self, monkeypatch, error=0):
        self.log, self.registered, self.error, self.streams = [], {}, error, 0
        self.current = self.Stream("cuda:0")
        cuda = {"Stream": self.Stream, "Event": self.Event, "current_stream": lambda device=None: self.current,
                "stream": self.on, "cudart": lambda: self, "current_device": lambda: 0}
        for name, value in cuda.items():
            monkeypatch.setattr(torch.cuda, name, value)
        self.copy = torch.Tensor.copy_
        monkeypatch.setattr(torch, "empty", self.empty)

    empty_of_torch = staticmethod(torch.empty)

    def empty(self, *args, device=None, **kwargs):
        return self.empty_of_torch(*args, **kwargs)

    def Stream(self, device):
        self.streams += 1
        return FakeStream(self, self.streams - 1)

    def Event(self):
        return FakeEvent(self)

    @contextlib.contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        self.log.append(("on", stream.number))
        yield
        self.current = before

    def cudaHostRegister(self, address, size, flags):
        assert flags == 0 and address not in self.registered
        self.registered[address] = size
        return self.error

    def cudaHostUnregister(self, address):
        del self.registered[address]


class FakeStream:
    def __init__(self, driver, number):
        self.driver, self.number = driver, number

    def wait_event(self, event):
        self.driver.log.append(("wait", self.number, event))

    def synchronize(self):
        self.driver.log.append(("host waits", self.number))


class FakeEvent:
    def __init__(self, driver):
        self.driver = driver

    def record(self, stream):
        self.driver.log.append(("record", stream.number, self))


def test_a_copy_waits_for_compute_and_for_its_event_and_then_tells(monkeypatch):
    driver = Driver(monkeypatch)
    transport = CudaTransport(torch.device("cuda"))
    after, done = transport.event(), transport.event()
    source, target = torch.arange(5, dtype=torch.uint8), torch.zeros(5, dtype=torch.uint8)
    driver.log.clear()
    transport.copy(target, source, Lane.OUT, after, done)
    boundary = driver.log[0][2]
    lane = driver.log[1][1]
    assert lane != driver.current.number
    assert driver.log == [("record", driver.current.number, boundary), ("wait", lane, boundary), ("wait", lane, after),
                          ("on", lane), ("record", lane, done)]
    assert torch.equal(target, source)
    lanes = set()
    for one in Lane:
        driver.log.clear()
        transport.copy(target, source, one, None, done)
        lanes.add(driver.log[-1][1])
        assert len(driver.log) == 4
    assert len(lanes) == len(Lane)
    driver.log.clear()
    transport.wait(done)
    assert driver.log == [("wait", driver.current.number, done)]


@pytest.mark.parametrize("size", [1, mmap.PAGESIZE, 3 * mmap.PAGESIZE + 1, 0])
def test_host_memory_is_pinned_page_by_page_and_never_to_a_power_of_two(monkeypatch, size):
    driver = Driver(monkeypatch)
    transport = CudaTransport(torch.device("cuda", 0))
    region = transport.host(size)
    assert region.shape == (size,)
    pages = max(1, -(-size // mmap.PAGESIZE))
    assert list(driver.registered.values()) == [pages * mmap.PAGESIZE] and region.data_ptr() % mmap.PAGESIZE == 0
    region.fill_(7)
    transport.close()
    assert not driver.registered and (region == 7).all()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_forked_processes_do_not_get_pinned_pages():
    region = _pages(10 * mmap.PAGESIZE)
    lines = Path("/proc/self/smaps").read_text().splitlines()
    start = next(index for index, line in enumerate(lines)
                 if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line) and
                 int(line.split("-")[0], 16) <= region.data_ptr() < int(line.split("-")[1].split()[0], 16))
    flags = next(line for line in lines[start:] if line.startswith("VmFlags:")).split()
    assert "dc" in flags  # do not copy on fork


def test_memory_that_cannot_be_pinned_is_told(monkeypatch):
    Driver(monkeypatch, error=2)
    with pytest.raises(UserError, match=r"2.00 GB of host memory could not be pinned \(2\); stream fewer blocks"):
        monkeypatch.setattr("library.memory.transport._pages", lambda size: torch.zeros(1, dtype=torch.uint8))
        CudaTransport(torch.device("cuda")).host(2 * 10**9)


def test_a_training_run_on_it(monkeypatch):
    """All of the engine over this transport; in its stride the host waits for nothing and makes nothing."""
    plain = Run(Setting(micro=2))
    plain.train(0, 3)
    driver = Driver(monkeypatch)
    ours = Run(Setting(streamed=5, look_ahead=1, unit="block", micro=2, stream_states=True,
                       transport=lambda: Host(torch.device("cuda", 0))))
    ours.train(0, 2)
    driver.log.clear()
    made = ours.transport.allocations
    ours.train(2, 3)
    assert ours.transport.allocations == made
    assert not [entry for entry in driver.log if entry[0] == "host waits"] and len(driver.log) > 50
    assert_same(ours.weights(), plain.weights())


class Host(CudaTransport):
    """Its tensors live on the CPU, so that is where the model goes."""

    def __init__(self, device):
        super().__init__(device)
        self._cuda, self.device = self.device, torch.device("cpu")


def test_the_device_decides():
    assert isinstance(open_transport(torch.device("cpu")), CpuTransport)
    with pytest.raises(UserError, match="'mps'"):
        open_transport(torch.device("mps"))
