"""Versions in the folder: which are kept, who may remove them, and what is refused."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import threading

import numpy as np
import pytest
from saved_models import apply, same

import qjax
from qjax.checkpoint import store, transfer
from qjax.errors import CheckpointError


def versions(path):
    return sorted(p.name for p in (path / "versions").iterdir())


def test_a_save_replaces_the_older_one(models, saved):
    first = versions(saved)
    folder = qjax.save(saved, models[1])
    assert folder.parent == saved / "versions" and versions(saved) == [folder.name] != first
    same(qjax.load(saved, apply).params, models[1].params)
    assert sorted(p.name for p in saved.iterdir()) == ["CURRENT", "versions"]


def test_older_versions_can_be_kept_and_loaded(models, saved):
    (first,) = versions(saved)
    for _ in range(3):
        last = qjax.save(saved, models[1], keep=2)
    assert len(versions(saved)) == 2 and first not in versions(saved)
    kept = qjax.save(saved, models[0], keep=2)
    assert versions(saved) == [last.name, kept.name]
    same(qjax.load(saved, apply).params, models[0].params)
    same(qjax.load(last, apply).params, models[1].params)  # one version by its own folder
    assert store.read_pointer(saved).older == (last.name,)
    assert versions(saved)[0].startswith("4-") and versions(saved)[1].startswith("5-")


@pytest.mark.parametrize("keep", [0, -1, 1.5, True, None])
def test_keep_is_a_positive_number(models, tmp_path, keep):
    with pytest.raises(CheckpointError, match="1 or more"):
        qjax.save(tmp_path / "m", models[0], keep=keep)


def test_what_is_no_model_or_function(tmp_path, saved):
    with pytest.raises(CheckpointError, match="the Model that qjax.quantize returned, not dict"):
        qjax.save(tmp_path / "m", {})
    with pytest.raises(CheckpointError, match="the function that was quantized, not str"):
        qjax.load(saved, "apply")


def test_folders_that_hold_something_else(models, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(CheckpointError, match=r"holds other things \(thesis.txt\)"):
        qjax.save(tmp_path, models[0])
    with pytest.raises(CheckpointError, match="is a file"):
        qjax.save(tmp_path / "thesis.txt", models[0])
    with pytest.raises(CheckpointError, match="no local folder"):
        qjax.save("gs://bucket/model", models[0])
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    qjax.save(tmp_path / "a" / "b", models[0])  # parents are made


def test_relative_paths_and_moving(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    qjax.save("m", models[0])
    shutil.move("m", "n")
    same(qjax.load("n", apply).params, models[0].params)
    os.symlink("n", "link")
    qjax.save("link", models[1])
    same(qjax.load("n", apply).params, models[1].params)


def test_only_versions_that_nobody_names_are_cleaned(models, saved):
    stale = saved / "versions" / "7-0123abcd"
    (stale / "arrays.orbax-checkpoint-tmp").mkdir(parents=True)
    foreign = saved / "versions" / "notes"
    foreign.mkdir()
    (saved / "CURRENT.tmp").write_text("half")
    folder = qjax.save(saved, models[1])
    assert versions(saved) == [folder.name, "notes"]
    assert not (saved / "CURRENT.tmp").exists()


def test_a_damaged_pointer_does_not_hinder_the_next_save(models, saved):
    (saved / "CURRENT").write_text("{")
    qjax.save(saved, models[1])
    same(qjax.load(saved, apply).params, models[1].params)
    assert len(versions(saved)) == 1


# -- Errors in the middle ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["write_arrays", "_write_manifest", "_point"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_error_leaves_the_older_checkpoint(models, saved, monkeypatch, step, error):
    def fail(*args):
        raise error

    before = versions(saved)
    monkeypatch.setattr(transfer if step == "write_arrays" else store, step, fail)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError
    with pytest.raises(expected) as caught:
        qjax.save(saved, models[1])
    if expected is CheckpointError:
        assert "No space left" in str(caught.value) and "untouched" in str(caught.value)
    assert versions(saved) == before
    same(qjax.load(saved, apply).params, models[0].params)


def test_an_error_after_the_pointer_moved_keeps_the_new_version(models, saved, monkeypatch):
    sync = store._sync_folder

    def fail(folder):
        if folder == saved:
            raise KeyboardInterrupt
        sync(folder)

    monkeypatch.setattr(store, "_sync_folder", fail)
    with pytest.raises(KeyboardInterrupt):
        qjax.save(saved, models[1])
    same(qjax.load(saved, apply).params, models[1].params)


def test_files_that_cannot_be_written(models, saved, capfd):
    # The storage beneath Orbax meets a limit as it would meet a full disk.
    big = qjax.quantize(
        lambda p, x: x @ p["w"], {"w": np.eye(512, dtype=np.float32)}, np.ones((1, 512), np.float32), recipe="W8A16"
    )
    noise = np.random.default_rng(0).integers(-9, 9, (1, 512, 512)).astype(np.int8)
    big.params["w"].__dict__["codes"] = noise[0]
    before, limits = versions(saved), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="failed .*untouched"):
            qjax.save(saved, big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert versions(saved) == before
    same(qjax.load(saved, apply).params, models[0].params)
    assert "Traceback" not in capfd.readouterr().err


# -- Readers and writers at once ---------------------------------------------------------------------------------------


def test_a_version_that_is_being_read_is_not_removed(models, saved):
    (first,) = versions(saved)
    with store.reading(saved) as folder:
        qjax.save(saved, models[1])
        store.verify(folder)
        assert folder.name == first and len(versions(saved)) == 2
    qjax.save(saved, models[1])
    assert first not in versions(saved) and len(versions(saved)) == 1


def test_loading_while_others_save(models, saved):
    stop, failures = threading.Event(), []

    def saver():
        try:
            while not stop.is_set():
                for model in models:
                    qjax.save(saved, model)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=saver) for _ in range(2)]
    for thread in threads:
        thread.start()
    seen = set()
    try:
        for _ in range(25):
            loaded = qjax.load(saved, apply)
            which = int(loaded.params["layers"][0]["b"][0]) - 1
            seen.add(which)
            same(loaded.params, models[which].params)
            assert loaded.report == models[which].report
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures and seen
    qjax.save(saved, models[0])
    assert len(versions(saved)) == 1


def test_without_locks(models, saved, monkeypatch):
    monkeypatch.setattr(store, "fcntl", None)
    qjax.save(saved, models[1])
    same(qjax.load(saved, apply).params, models[1].params)
    assert len(versions(saved)) == 1


def test_another_saver_is_waited_for(models, saved, monkeypatch):
    monkeypatch.setattr(store, "_LOCK_SECONDS", 0.2)
    with store._exclusive(saved), pytest.raises(CheckpointError, match="another process has been saving"):
        qjax.save(saved, models[1])
    qjax.save(saved, models[1])


def test_inside_a_running_event_loop(models, tmp_path):
    import asyncio

    async def notebook_cell():
        qjax.save(tmp_path / "m", models[0])
        return qjax.load(tmp_path / "m", apply)

    same(asyncio.run(notebook_cell()).params, models[0].params)


def test_orbax_that_cannot_read(saved, monkeypatch):
    import orbax.checkpoint as ocp

    def fail(*args, **kwargs):
        raise RuntimeError("layout 9 of\nthe future")

    monkeypatch.setattr(ocp.Checkpointer, "restore", fail)
    with pytest.raises(CheckpointError, match=r"cannot read it \(layout 9 of the future\)"):
        qjax.load(saved, apply)
