from __future__ import annotations

import itertools
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepspeed.native import file_engine
from deepspeed.native.file_engine import Backend, QueueOptions
from deepspeed.native.file_errors import SHORT_FILE, Extent, failure
from deepspeed.native.files import FileQueue, FileTransfer, aligned_empty

BACKENDS = [name for name, text in file_engine.backends().items() if not text.startswith("not ")]
OPTIONS = (
    QueueOptions(block_size=5000, queue_depth=4, thread_count=2),
    QueueOptions(block_size=65536, queue_depth=3, single_submit=True),
    QueueOptions(block_size=8192, queue_depth=5, overlap_events=False),
)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param


@pytest.fixture
def queue(backend: Backend) -> Iterator[FileQueue]:
    with FileQueue(QueueOptions(block_size=65536, queue_depth=4), backend=backend) as queue:
        yield queue


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk's file system and one on tmpfs, which know O_DIRECT or do not."""
    if request.param == "disk":
        yield tmp_path
        return
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no /dev/shm here")
    path = Path("/dev/shm") / f"files-{os.getpid()}"
    path.mkdir()
    yield path
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


def random_bytes(rng: random.Random, nbytes: int, *, shift: int = 0) -> Tensor:
    """Random bytes in memory that begins ``shift`` bytes after a page."""
    memory = aligned_empty(nbytes + shift, torch.uint8)[shift:]
    if nbytes:
        memory.copy_(torch.frombuffer(bytearray(rng.randbytes(nbytes)), dtype=torch.uint8))
    return memory


@pytest.mark.parametrize("options", OPTIONS, ids=["unaligned blocks", "single submit", "batches"])
def test_any_offset_size_and_memory_moves_the_bytes_that_plain_reads_see(
    backend: Backend, options: QueueOptions, folder: Path
) -> None:
    rng = random.Random(repr(options))
    contents = bytearray(rng.randbytes(1_000_000))
    path = folder / "file"
    path.write_bytes(contents)
    with FileQueue(options, backend=backend) as queue, queue.open(path) as file:
        for _ in range(60):
            nbytes = rng.choice([0, 1, 511, 512, 4096, rng.randrange(200_000)])
            offset = rng.choice([0, 512, 4096, rng.randrange(1_000_000 - nbytes)])
            shift = rng.choice([0, 1, 64, 512])
            if rng.random() < 0.5:
                memory = random_bytes(rng, nbytes, shift=shift)
                file.submit_read(memory, offset).wait()
                assert bytes(memory.numpy()) == contents[offset : offset + nbytes]
            else:
                memory = random_bytes(rng, nbytes, shift=shift)
                file.submit_write(memory, offset).wait()
                contents[offset : offset + nbytes] = bytes(memory.numpy())
    assert path.read_bytes() == contents


def test_transfers_in_flight_together_do_not_mix(queue: FileQueue, folder: Path) -> None:
    rng = random.Random(0)
    # Neighbours share blocks of the disk and pages of the cache.
    bounds = sorted({0, *(rng.randrange(3_000_000) for _ in range(100)), 3_000_000})
    extents = list(itertools.pairwise(bounds))
    parts = [random_bytes(rng, end - begin, shift=rng.choice([0, 1])) for begin, end in extents]
    with queue.open(folder / "file", nbytes=3_000_000) as file:
        order = rng.sample(range(len(parts)), len(parts))
        for transfer in [file.submit_write(parts[index], extents[index][0]) for index in order]:
            transfer.wait()
        assert (folder / "file").read_bytes() == b"".join(bytes(part.numpy()) for part in parts)
        found = [torch.empty_like(part) for part in parts]
        for transfer in [file.submit_read(found[index], extents[index][0]) for index in order]:
            transfer.wait()
    assert all(torch.equal(mine, written) for mine, written in zip(found, parts, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_of_any_dtype_and_shape_come_back(queue: FileQueue, tmp_path: Path, dtype: torch.dtype) -> None:
    written = torch.randn(37, 1001).to(dtype)
    with queue.open(tmp_path / "file") as file:
        file.submit_write(written, 4096).wait()
        assert file.nbytes == 4096 + written.nbytes
        found = torch.zeros_like(written)
        file.submit_read(found, 4096).wait()
    assert torch.equal(found, written)


def test_a_file_opened_with_a_size_has_its_room_and_keeps_what_was_in_it(queue: FileQueue, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    with queue.open(tmp_path / "file", nbytes=1 << 20) as file:
        assert file.nbytes == 1 << 20
        assert (tmp_path / "file").stat().st_blocks * 512 >= 1 << 20
    with queue.open(tmp_path / "file", nbytes=10) as file:
        assert file.nbytes == 1 << 20
    assert (tmp_path / "file").read_bytes()[:4] == b"abc\0"


def test_registered_memory_moves_the_same_bytes(queue: FileQueue, folder: Path) -> None:
    rng = random.Random(1)
    memory = aligned_empty(500_000, torch.uint8)
    registered = [queue.register(memory), *(queue.register(torch.empty(10)) for _ in range(70))]
    assert not registered[-1], "the kernel's table has 64 places"
    assert queue.backend == "io_uring" or not any(registered)
    with queue.open(folder / "file", nbytes=500_000) as file:
        for shift in (0, 1, 512):
            part = memory[shift : shift + 400_000]
            part.copy_(random_bytes(rng, 400_000))
            written = part.clone()
            file.submit_write(part, shift).wait()
            part.zero_()
            file.submit_read(part, shift).wait()
            assert torch.equal(part, written)
            assert (folder / "file").read_bytes()[shift : shift + 400_000] == bytes(written.numpy())
    with pytest.raises(ValueError, match="pass a contiguous one on cpu"):
        queue.register(memory[::2])


def test_an_aligned_tensor_begins_at_a_page_and_may_be_empty() -> None:
    tensor = aligned_empty(1001, torch.bfloat16)
    assert tensor.shape == (1001,) and tensor.dtype == torch.bfloat16
    assert tensor.data_ptr() % 4096 == 0
    assert aligned_empty(0, torch.float32).numel() == 0


def test_the_tensor_of_a_transfer_and_its_file_live_until_its_end(queue: FileQueue, tmp_path: Path) -> None:
    values = torch.arange(1 << 20)

    def forget() -> None:
        queue.open(tmp_path / "file").submit_write(values.clone())

    forget()
    queue.close()
    assert torch.equal(torch.frombuffer(bytearray((tmp_path / "file").read_bytes()), dtype=torch.int64), values)


def test_a_queue_that_is_garbage_completes_what_was_submitted(backend: Backend, tmp_path: Path) -> None:
    values, before = torch.arange(1 << 20), threading.active_count()
    FileQueue(backend=backend).open(tmp_path / "file").submit_write(values)
    assert (tmp_path / "file").stat().st_size == values.nbytes
    assert threading.active_count() == before


def test_a_failure_that_nobody_waited_for_is_raised_by_closing(backend: Backend, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    queue = FileQueue(backend=backend)
    queue.open(tmp_path / "file").submit_read(torch.empty(10))
    with pytest.raises(OSError, match="the file ends at byte 3"):
        queue.close()
    queue.close()


def test_what_does_not_fit_is_refused_before_anything_moves(queue: FileQueue, tmp_path: Path) -> None:
    with queue.open(tmp_path / "file") as file:
        with pytest.raises(ValueError, match=r"writing 40 bytes at offset -1 of .*file: the offset is negative"):
            file.submit_write(torch.empty(10), -1)
        with pytest.raises(ValueError, match=r"strides \(2,\); pass one that is contiguous"):
            file.submit_read(torch.empty(10)[::2])
        with pytest.raises(TypeError, match="the tensor is on meta; copy it"):
            file.submit_read(torch.empty(10, device="meta"))
    with pytest.raises(ValueError, match="the file is closed"):
        file.submit_read(torch.empty(10))
    with queue.open(tmp_path / "file", writable=False) as file, pytest.raises(ValueError, match="writable=False"):
        file.submit_write(torch.empty(10))
    queue.close()
    with pytest.raises(RuntimeError, match="the queue is closed"):
        queue.open(tmp_path / "file").submit_read(torch.empty(10))


@pytest.mark.parametrize(("key", "value"), [("block_size", 0), ("queue_depth", 5000), ("thread_count", 0)])
def test_options_out_of_bounds_are_an_error_that_names_them(key: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{key} is {value}, expected 1 to"):
        QueueOptions(**{key: value})


def test_an_unknown_backend_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected one of io_uring, threads, python"):
        FileQueue(backend="libaio")  # type: ignore[arg-type]


class Refusing:
    """A core whose kernel allows no io_uring."""

    def uring_refusal(self) -> str:
        return "io_uring_setup: Operation not permitted"

    def direct_alignments(self, descriptor: int) -> tuple[int, int]:
        return 0, 0


@pytest.mark.parametrize(("core", "best"), [(Refusing(), "threads"), (None, "python")])
def test_without_io_uring_threads_take_its_place_and_without_the_core_python(core, best: str, monkeypatch) -> None:
    monkeypatch.setattr(file_engine, "_load", lambda: (core, "" if core else "the core was not compiled"))
    monkeypatch.setattr(file_engine, "backends", file_engine.backends.__wrapped__)
    assert file_engine.best_backend() == best
    assert "io_uring not available: " in file_engine.status()
    assert file_engine.direct_alignments(0) == (4096, 4096)
    with pytest.raises(ValueError, match=f"'io_uring' is not available: .*leave it out to use '{best}'"):
        file_engine.make_engine(QueueOptions(), "io_uring")


def fork(function: Callable[[], int]) -> int:
    """The exit code of a fork that calls ``function``."""
    process = os.fork()
    if process == 0:
        os._exit(function())
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_in_a_fork_a_queue_is_an_error_and_its_end_does_not_hang(queue: FileQueue, tmp_path: Path) -> None:
    file = queue.open(tmp_path / "file")
    memory = torch.zeros(10)

    def child() -> int:
        try:
            file.submit_write(memory)
        except RuntimeError as error:
            queue._end()
            return 7 if "made before a fork" in str(error) else 1
        return 0

    assert fork(child) == 7
    file.submit_write(memory).wait()


def test_a_transfer_is_one_record_of_what_it_does() -> None:
    assert str(Extent("/file", 8, 16, False)) == "reading 16 bytes at offset 8 of /file"
    error = failure(Extent("/file", 8, 16, False), SHORT_FILE, 4, 4)
    assert "the file ends at byte 12; 4 bytes were transferred" in str(error)


def test_a_transfer_may_be_waited_for_twice(queue: FileQueue, tmp_path: Path) -> None:
    transfer: FileTransfer = queue.open(tmp_path / "file").submit_write(torch.zeros(10))
    transfer.wait()
    transfer.wait(timeout=0)
    assert transfer.done and transfer.succeeded
