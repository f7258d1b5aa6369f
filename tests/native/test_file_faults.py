"""What goes wrong with files is an error that says where and what to do, and nothing hangs."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from deepspeed.native import file_engine
from deepspeed.native.file_engine import Backend, QueueOptions
from deepspeed.native.file_errors import (
    FileTransferError,
    ShortFileError,
    TransferCancelledError,
    TransferTimeoutError,
)
from deepspeed.native.files import FileQueue, FileTransfer

BACKENDS = [name for name, text in file_engine.backends().items() if not text.startswith("not ")]
BLOCK = 65536


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param


@pytest.fixture
def queue(backend: Backend) -> Iterator[FileQueue]:
    with FileQueue(QueueOptions(block_size=BLOCK, queue_depth=4), backend=backend) as queue:
        yield queue


@pytest.fixture
def small_folder(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True, text=True, check=False
    )
    if mount.returncode != 0:
        pytest.skip(f"mounting is not allowed here: {mount.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_device_is_an_error_with_place_and_free_space(queue: FileQueue) -> None:
    with queue.open("/dev/full") as file, pytest.raises(FileTransferError) as caught:
        file.submit_write(torch.zeros(100_000, dtype=torch.uint8), 4096).wait()
    error = caught.value
    assert (error.errno, error.filename, error.offset, error.nbytes) == (errno.ENOSPC, "/dev/full", 4096, 100_000)
    assert error.transferred == 0
    assert "writing 100000 bytes at offset 4096 of /dev/full: No space left on device (ENOSPC) at byte" in str(error)
    assert "bytes free of" in str(error) and "choose another directory" in str(error)


def test_a_full_file_system_says_what_was_written_and_that_nothing_is_free(queue: FileQueue, small_folder: Path) -> None:
    with queue.open(small_folder / "file") as file:
        with pytest.raises(FileTransferError, match=r"ENOSPC.* its file system has 0 bytes free of 1048576") as caught:
            file.submit_write(torch.zeros(3 << 20, dtype=torch.uint8)).wait()
        assert 0 < caught.value.transferred <= 1 << 20
        os.truncate(small_folder / "file", 0)
        # What failed holds nothing up.
        file.submit_write(torch.ones(1000)).wait()


def test_a_size_that_does_not_fit_is_refused_when_the_file_is_opened(queue: FileQueue, small_folder: Path) -> None:
    with pytest.raises(FileTransferError, match=r"writing 8388608 bytes at offset 0 of .*ENOSPC.*bytes free of 1048576"):
        queue.open(small_folder / "file", nbytes=8 << 20)


def test_the_limit_on_file_sizes_is_an_error_that_names_it(queue: FileQueue, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BLOCK * 2, before[1]))
    try:
        with queue.open(tmp_path / "file") as file, pytest.raises(FileTransferError, match=r"EFBIG.*ulimit -f") as caught:
            file.submit_write(torch.zeros(BLOCK * 4, dtype=torch.uint8)).wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.transferred <= BLOCK * 2


@pytest.mark.parametrize("length", [0, 1000, 4096, BLOCK, BLOCK + 1, BLOCK * 3 - 1])
def test_a_truncated_file_is_an_error_that_says_where_it_ends(queue: FileQueue, tmp_path: Path, length: int) -> None:
    (tmp_path / "file").write_bytes(bytes(BLOCK * 3))
    with queue.open(tmp_path / "file") as file:
        os.truncate(tmp_path / "file", length)
        with pytest.raises(ShortFileError, match=r"was it truncated\?") as caught:
            file.submit_read(torch.empty(BLOCK * 3, dtype=torch.uint8)).wait()
        assert caught.value.transferred <= length
        if length % BLOCK or not length:
            assert f"the file ends at byte {length};" in str(caught.value)
        file.submit_read(torch.empty(length, dtype=torch.uint8)).wait()


def test_a_device_that_fails_is_an_error_that_points_at_it(queue: FileQueue) -> None:
    # Nothing is mapped at address 0: the kernel answers as a broken disk does.
    broken = r"\(EIO\) at byte 0; 0 bytes .*the device failed"
    with queue.open("/proc/self/mem", writable=False) as file, pytest.raises(FileTransferError, match=broken) as caught:
        file.submit_read(torch.empty(1000)).wait()
    assert caught.value.errno == errno.EIO


def test_a_directory_or_a_missing_folder_is_the_error_of_opening(queue: FileQueue, tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        queue.open(tmp_path)
    with pytest.raises(FileNotFoundError, match="missing"):
        queue.open(tmp_path / "missing" / "file")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_revoked_permission_is_an_error_that_names_the_file(queue: FileQueue, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    path.chmod(0)

    def child() -> None:
        if os.geteuid() == 0:
            os.seteuid(65534)  # root may do everything
        try:
            queue.open(path)
        except PermissionError as error:
            os._exit(7 if error.filename == str(path) else 1)

    assert os.waitstatus_to_exitcode(os.waitpid(fork(child), 0)[1]) == 7


def test_an_open_file_whose_permission_is_revoked_goes_on(queue: FileQueue, tmp_path: Path) -> None:
    with queue.open(tmp_path / "file") as file:
        (tmp_path / "file").chmod(0)
        file.submit_write(torch.ones(100)).wait()
        found = torch.zeros(100)
        file.submit_read(found).wait()
    assert found.sum() == 100


@pytest.fixture
def endless(backend: Backend, tmp_path: Path) -> Iterator[FileTransfer]:
    """A read that takes long: very many small requests, one at a time."""
    with (tmp_path / "file").open("wb") as file:
        file.truncate(4 << 30)
    queue = FileQueue(QueueOptions(block_size=4096, queue_depth=1), backend=backend)
    transfer = queue.open(tmp_path / "file").submit_read(torch.empty(4 << 30, dtype=torch.uint8))
    yield transfer
    transfer.cancel()
    with pytest.raises(TransferCancelledError):
        queue.close()
        transfer.wait()


def test_a_wait_in_vain_is_an_error_and_the_transfer_goes_on(endless: FileTransfer) -> None:
    with pytest.raises(TransferTimeoutError, match=r"reading 4294967296 bytes .* in 0\.01 seconds; it goes on") as caught:
        endless.wait(timeout=0.01)
    assert isinstance(caught.value, TimeoutError) and caught.value.errno == errno.ETIMEDOUT
    assert not endless.done
    with pytest.raises(TransferTimeoutError):
        endless.wait(timeout=0)


def test_who_waits_leaves_python_to_others_and_hears_of_cancellation(endless: FileTransfer) -> None:
    errors: list[FileTransferError] = []

    def wait() -> None:
        try:
            endless.wait()
        except FileTransferError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.01)
    endless.cancel()
    thread.join(timeout=30)
    assert len(errors) == 1 and isinstance(errors[0], TransferCancelledError)
    assert "cancelled; " in str(errors[0]) and errors[0].transferred < 4 << 30


def test_a_signal_reaches_who_waits(endless: FileTransfer) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(KeyboardInterrupt):
            endless.wait()
    finally:
        signal.signal(signal.SIGALRM, before)


def test_cancelling_what_has_ended_changes_nothing(queue: FileQueue, tmp_path: Path) -> None:
    transfer = queue.open(tmp_path / "file").submit_write(torch.ones(10))
    transfer.wait()
    transfer.cancel()
    transfer.wait()
    assert transfer.succeeded


def test_an_error_comes_whole_from_another_process(queue: FileQueue, tmp_path: Path) -> None:
    with pytest.raises(ShortFileError) as caught:
        queue.open(tmp_path / "file").submit_read(torch.empty(10)).wait()
    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is ShortFileError
    assert (str(copy), copy.path, copy.nbytes) == (str(caught.value), str(tmp_path / "file"), 40)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_writer_killed_in_the_middle_leaves_a_file_that_can_be_used(backend: Backend, tmp_path: Path) -> None:
    path, size = tmp_path / "file", 8 << 20
    values = torch.full((size,), 7, dtype=torch.uint8)
    read, write = os.pipe()

    def child() -> None:
        file = FileQueue(QueueOptions(block_size=BLOCK), backend=backend).open(path, nbytes=size)
        while True:
            transfers = [file.submit_write(values) for _ in range(8)]
            os.write(write, b".")
            for transfer in transfers:
                transfer.wait()

    process = fork(child)
    assert os.read(read, 1) == b"."
    os.kill(process, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    os.close(read)
    os.close(write)
    found = torch.empty(size, dtype=torch.uint8)
    with FileQueue(backend=backend) as queue, queue.open(path) as file:
        file.submit_read(found).wait()
        assert {0, 7} >= set(found.unique().tolist())
        file.submit_write(torch.full_like(found, 9)).wait()
    assert path.read_bytes() == bytes([9]) * size


def test_the_end_of_the_program_completes_what_nobody_waited_for(tmp_path: Path) -> None:
    run(f"""
import torch
from deepspeed.native.files import FileQueue
for backend in {BACKENDS!r}:
    path = {str(tmp_path)!r} + "/" + backend
    FileQueue(backend=backend).open(path).submit_write(torch.full((8 << 20,), 7, dtype=torch.uint8))
    keep = queue = FileQueue(backend=backend)
    queue.open(path + "-kept").submit_write(torch.full((8 << 20,), 7, dtype=torch.uint8))
""")
    assert len(list(tmp_path.iterdir())) == 2 * len(BACKENDS)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == bytes([7]) * (8 << 20)


def test_where_the_kernel_refuses_io_uring_the_reason_is_reported() -> None:
    program = """
import resource
from deepspeed.native import core, file_engine
import os
core.load()
opened = os.open("/dev/null", os.O_RDONLY)
resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 1, opened + 1))
print(file_engine.best_backend(), file_engine.status())
"""
    if file_engine.backends()["threads"].startswith("not "):
        pytest.skip("needs the compiled core")
    assert "threads threads of the compiled core; io_uring not available: io_uring_setup: " in run(program)


def fork(function: Callable[[], None]) -> int:
    """The process id of a fork that calls ``function``."""
    process = os.fork()
    if process == 0:
        function()
        os._exit(1)
    return process


def run(program: str) -> str:
    """What the program prints; it must end well."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
