"""torch.save's files: torch reads what we write, and tensors stay in the file until somebody wants them."""

import io
import weakref
import zipfile

import pytest
import torch

from runtime.archive import STORAGES, LazyTensor, read_archive, write_archive


def numbers(dtype):
    return (torch.randn(3, 5, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)


def write(path, state):
    with open(path, "wb") as file:
        write_archive(file, state)
    return path


@pytest.mark.parametrize("device", ["cpu", "disk"])
def test_torch_and_we_read_what_we_write(tmp_path, device):
    w = numbers(torch.float32)
    state = {str(dtype): numbers(dtype) for dtype in STORAGES.values()}
    state |= {"part": w[1:, ::2], "turned": w.T, "number": torch.tensor(3), "none": torch.empty(0, 4)}
    state = {"step": 3, "text": "é", "nothing": None, "list": [1.5, True], "model": state}
    path = write(tmp_path / "a.pt", state)
    for found in (torch.load(path, weights_only=True), read_archive(path, device)):
        model = found.pop("model")
        assert found == {"step": 3, "text": "é", "nothing": None, "list": [1.5, True]}
        assert list(model) == list(state["model"])
        for name, tensor in state["model"].items():
            assert torch.equal(model[name], tensor) and model[name].dtype == tensor.dtype
            assert model[name].untyped_storage().nbytes() == tensor.nbytes, "a part brings its own numbers only"
        assert model["part"].is_contiguous()


def test_tied_weights_are_written_once_and_stay_tied(tmp_path):
    head = torch.nn.Linear(50, 40, bias=False)
    lazy = LazyTensor((40, 50), lambda: torch.ones(40, 50))
    other = LazyTensor((2,), lambda: torch.ones(2))
    state = {"a": head.weight, "b": head.weight.detach(), "c": lazy, "d": lazy, "e": other}
    path = write(tmp_path / "a.pt", state)
    assert len([name for name in zipfile.ZipFile(path).namelist() if "/data/" in name]) == 3
    found = torch.load(path, weights_only=True)
    assert found["a"].data_ptr() == found["b"].data_ptr() and found["c"].data_ptr() == found["d"].data_ptr()
    assert torch.equal(found["a"], head.weight) and found["c"].sum() == 2000


def test_one_lazy_tensor_at_a_time_is_in_memory(tmp_path):
    alive = weakref.WeakSet()

    def load():
        assert not alive
        tensor = torch.ones(7, 3)
        alive.add(tensor.untyped_storage())
        return tensor

    write(tmp_path / "a.pt", [LazyTensor((7, 3), load) for _ in range(5)])
    assert not alive


def test_tensors_on_the_disk_are_part_of_the_file_and_never_change_it(tmp_path):
    path = write(tmp_path / "a.pt", {"w": numbers(torch.float32)})
    content = path.read_bytes()
    tensor = read_archive(path, "disk")["w"]
    tensor.zero_()
    assert path.read_bytes() == content
    places = [entry.header_offset for entry in zipfile.ZipFile(path).infolist() if "/data/" in entry.filename]
    begin = content.index(numbers(torch.float32).numpy().tobytes(), places[0])
    assert begin % 64 == 0


def test_a_file_that_is_not_aligned_is_read_all_the_same(tmp_path):
    path = write(tmp_path / "a.pt", {"w": numbers(torch.float64)})
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for name in old.namelist():
            new.writestr(zipfile.ZipInfo(name), old.read(name))
    raw = (tmp_path / "b.pt").read_bytes()
    assert raw.index(numbers(torch.float64).numpy().tobytes()) % 8
    assert torch.equal(read_archive(tmp_path / "b.pt", "disk")["w"], numbers(torch.float64))


@pytest.mark.parametrize("device", ["cpu", "disk"])
def test_a_changed_number_is_found(tmp_path, device):
    path = write(tmp_path / "a.pt", {"w": numbers(torch.float32)})
    content = bytearray(path.read_bytes())
    content[content.index(numbers(torch.float32).numpy().tobytes()) + 9] ^= 1
    path.write_bytes(content)
    with pytest.raises(zipfile.BadZipFile, match="data/0"):
        read_archive(path, device)


def test_a_full_disk_raises_its_own_error():
    class Full(io.BytesIO):
        def write(self, data):
            if self.tell() > 2000:
                raise OSError(28, "No space left on device")
            return super().write(data)

    with pytest.raises(OSError, match="No space left"):
        write_archive(Full(), {"w": torch.ones(4000)})
