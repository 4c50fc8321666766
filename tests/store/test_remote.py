"""What an object store holds: whole files and whole directories, and copies of these on a node's disk."""

import json
import multiprocessing
from pathlib import Path

import pytest

from evolve.config import ConfigError, load
from evolve.errors import StorageError
from evolve.files import (
    Lines,
    file_digest,
    is_published,
    local_directory,
    mirror,
    place,
    publish_directory,
    publish_file,
    publish_json,
    put_share,
    remove_tree,
)
from evolve.learn import rows
from evolve.policy.checkpoint import DigestMismatch, digest, resolve, verify
from evolve.remote import INDEX, Damaged, RemotePath, cache_root
from evolve.store.run import RoundDirectory, RunDirectory
from tests.learn.conftest import make_trajectories
from tests.object_store.use import objects_at


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemotePath:
    monkeypatch.setenv("EVOLVE_CACHE", str(tmp_path / "cache"))
    return objects_at(tmp_path / "bucket", monkeypatch)


def model(directory: Path, weights: bytes = b"weights") -> Path:
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(weights)
    (directory / "config.json").write_text("{}")
    (directory / "notes").mkdir()
    (directory / "notes" / "a.txt").write_text("not of the model")
    return directory


def object_file(path: RemotePath) -> Path:
    """Where the test's store keeps an object."""
    return Path(path.uri.removeprefix("objects://"))


def test_addresses_are_told_from_paths() -> None:
    assert place("s3://bucket/runs/") == RemotePath("s3://bucket/runs")
    assert place("file:///shared/runs") == place("/shared/runs") == Path("/shared/runs")
    assert RunDirectory.of("gs://b/runs", "x").round(2).sft == RemotePath("gs://b/runs/x/round-2/sft")
    assert RunDirectory.of("runs", "x").path == Path("runs/x").absolute()


@pytest.mark.parametrize("address", ["s3://key:hush@bucket/runs", "s3://bucket/runs?secret=hush"])
def test_an_address_with_a_secret_is_refused_and_not_repeated(address: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.dir: holds a password") as refused:
        load([f"run.dir={address}"])
    assert "hush" not in str(refused.value)
    load(["run.dir=abfs://container@account.dfs.core.windows.net/runs"])


def test_a_model_at_an_address_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=r"policy\.model: is s3://b/model.*give a directory, or a hub name"):
        load(["policy.model=s3://b/model", "policy.format=code"])


def test_a_file_is_there_whole_or_not_at_all(store: RemotePath) -> None:
    def half(aside: Path) -> None:
        aside.write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        publish_file(store / "a.json", half)
    assert not (store / "a.json").exists()
    publish_json(store / "a.json", {"x": 1})
    assert json.loads((store / "a.json").read_text()) == {"x": 1}
    assert not any(path.is_file() for path in cache_root().rglob("*")), "nothing is left aside"


def test_a_directory_counts_only_once_all_of_it_is_there(
    store: RemotePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OBJECTS_FAIL", f"*{INDEX}")
    with pytest.raises(StorageError, match="the store takes nothing"):
        publish_directory(model(tmp_path / "first"), store / "checkpoint")
    assert (store / "checkpoint" / "model.safetensors").is_file()
    assert not is_published(store / "checkpoint")
    with pytest.raises(FileNotFoundError, match="no such directory, or not all of it was uploaded"):
        digest(store / "checkpoint")
    monkeypatch.delenv("OBJECTS_FAIL")
    publish_directory(model(tmp_path / "second", b"others"), store / "checkpoint")
    assert is_published(store / "checkpoint")
    assert (local_directory(store / "checkpoint") / "model.safetensors").read_bytes() == b"others"


def test_what_is_put_over_an_older_directory_is_no_mixture_of_both(
    store: RemotePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_directory(model(tmp_path / "old"), store / "checkpoint")
    monkeypatch.setenv("OBJECTS_FAIL", f"*{INDEX}")
    with pytest.raises(StorageError):
        publish_directory(model(tmp_path / "new", b"others"), store / "checkpoint")
    assert not is_published(store / "checkpoint")


def test_a_checkpoint_has_the_same_digest_wherever_it_is_and_is_found_without_its_writer(
    store: RemotePath, tmp_path: Path
) -> None:
    expected = digest(model(tmp_path / "model"))
    publish_directory(tmp_path / "model", store / "checkpoint")
    assert digest(store / "checkpoint") == verify(str(store / "checkpoint"), expected) == expected
    remove_tree(cache_root())
    assert digest(resolve(str(store / "checkpoint"))) == expected
    assert (local_directory(store / "checkpoint") / "notes" / "a.txt").is_file()


def test_a_checkpoint_that_changed_in_the_store_is_refused(store: RemotePath, tmp_path: Path) -> None:
    expected = digest(model(tmp_path / "model"))
    publish_directory(tmp_path / "model", store / "checkpoint")
    remove_tree(cache_root())
    weights = object_file(store / "checkpoint" / "model.safetensors")
    weights.write_bytes(b"Weights")
    with pytest.raises(Damaged, match=r"model\.safetensors is not what was published there"):
        resolve(str(store / "checkpoint"))
    assert not [path for path in (cache_root() / "directories").iterdir() if path.is_dir()]
    weights.write_bytes(b"weigh")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors has 5 bytes where 7 were put"):
        digest(store / "checkpoint")
    publish_directory(model(tmp_path / "other", b"others"), store / "checkpoint")
    with pytest.raises(DigestMismatch):
        verify(store / "checkpoint", expected)


def _materialise(address: str, start: object, found: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    path = local_directory(place(address))
    found.put((str(path), (path / "model.safetensors").stat().st_ino))  # type: ignore[attr-defined]


def test_several_processes_of_a_node_fetch_a_directory_once(
    store: RemotePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_directory(model(tmp_path / "model"), store / "checkpoint")
    remove_tree(cache_root())
    monkeypatch.setenv("OBJECTS_LOG", str(tmp_path / "log"))
    context = multiprocessing.get_context("fork")
    start, found = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_materialise, args=(str(store / "checkpoint"), start, found)) for _ in range(4)]
    for process in processes:
        process.start()
    copies = {found.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
    assert len(copies) == 1
    assert (tmp_path / "log").read_text().count("model.safetensors") == 1


def test_a_copy_that_is_not_whole_is_fetched_again(store: RemotePath, tmp_path: Path) -> None:
    publish_directory(model(tmp_path / "model"), store / "checkpoint")
    copy = local_directory(store / "checkpoint")
    (copy / "model.safetensors").write_bytes(b"we")
    assert (local_directory(store / "checkpoint") / "model.safetensors").read_bytes() == b"weights"
    (copy / "config.json").unlink()
    assert (local_directory(store / "checkpoint") / "config.json").read_text() == "{}"


def test_a_directory_may_be_put_in_shares_from_several_disks(store: RemotePath, tmp_path: Path) -> None:
    first, second = model(tmp_path / "a"), tmp_path / "b"
    second.mkdir()
    (second / "part-1").write_text("of the other node")
    files = put_share(first, ["config.json", "model.safetensors"], store / "c") | put_share(
        second, ["part-1"], store / "c"
    )
    assert not is_published(store / "c")
    (store / "c").publish(files)
    assert sorted(path.name for path in local_directory(store / "c").iterdir()) == [
        "config.json", "model.safetensors", "part-1",
    ]  # fmt: skip


def test_a_store_that_does_not_answer_is_not_an_empty_one(store: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RoundDirectory(store / "round-1", 1)
    directory.record("search", trees=3)
    monkeypatch.setenv("OBJECTS_AWAY", "1")
    for question in (directory.manifest, (store / "x").exists, (store / "x").is_file, lambda: store.glob("*")):
        with pytest.raises(StorageError, match=r"ConnectionError: the store is away.*what is finished stays"):
            question()
    monkeypatch.delenv("OBJECTS_AWAY")
    assert directory.finished("search") == {"trees": 3}


def test_a_store_whose_library_is_missing_is_named() -> None:
    with pytest.raises(StorageError, match=r"nosuch://bucket/x: .*nosuch"):
        RemotePath("nosuch://bucket/x").exists()


def test_lines_go_on_where_another_node_stopped(store: RemotePath) -> None:
    for text in ("one", "two"):
        lines = Lines(store / "metrics.jsonl")
        lines.add(text)
        lines.publish()
        remove_tree(cache_root())
    assert (store / "metrics.jsonl").read_text() == "one\ntwo\n"


def test_training_rows_are_fetched_once_a_node_and_anew_when_they_change(
    store: RemotePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OBJECTS_LOG", str(tmp_path / "log"))
    for count in (3, 5):
        rows.write(rows.to_table(make_trajectories(count)), store / "rows.arrow")
        assert [rows.read(store / "rows.arrow").num_rows for _ in range(2)] == [count] * 2
    assert (tmp_path / "log").read_text().count("rows.arrow") == 2


def test_what_others_write_is_held_without_links(store: RemotePath, tmp_path: Path) -> None:
    mirror(tmp_path / "wandb", store / "wandb")
    assert not (store / "wandb").exists()
    (tmp_path / "wandb" / "run-1").mkdir(parents=True)
    (tmp_path / "wandb" / "run-1" / "log").write_text("a")
    (tmp_path / "wandb" / "latest-run").symlink_to("run-1")
    (tmp_path / "wandb" / "debug.log").symlink_to("run-1/log")
    (tmp_path / "wandb" / "gone.log").symlink_to("nowhere")
    mirror(tmp_path / "wandb", store / "wandb")
    (tmp_path / "wandb" / "run-1" / "log").write_text("ab")
    mirror(tmp_path / "wandb", store / "wandb")
    assert store.glob("*") == [store / "wandb"]
    assert (store / "wandb").glob("*") == [store / "wandb" / "run-1"]
    assert (store / "wandb" / "run-1" / "log").read_text() == "ab"


def test_the_digest_of_an_object_follows_its_content(store: RemotePath, tmp_path: Path) -> None:
    publish_json(store / "a", 1)
    before = file_digest(store / "a")
    object_file(store / "a").write_bytes(b"2\n")
    (tmp_path / "same").write_bytes(b"2\n")
    assert file_digest(store / "a") == file_digest(tmp_path / "same") != before
