"""Accuracy, labelled image sets, SQNR and the progress bar."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from qjax import evaluate
from qjax.errors import DataError


def passes_on(params, x):
    """A classifier whose logits are its input."""
    return x * params


ONE = jnp.float32(1.0)


def test_ranks_by_hand():
    logits = np.eye(10, dtype=np.float32)[[3, 4, 5, 6]] * 2
    logits[1, 9] = 3.0  # label 4 comes second
    logits[2, [0, 1, 2, 3, 4, 6]] = 5.0  # label 5 comes seventh
    result = evaluate.accuracy(passes_on, ONE, logits, [3, 4, 5, 6], batch_size=3)
    assert (result.correct, result.correct_top5, result.images) == (2, 3, 4)
    assert (result.top1, result.top5) == (0.5, 0.75)
    exact = -np.log(np.exp(logits)[np.arange(4), [3, 4, 5, 6]] / np.exp(logits).sum(1)).mean()
    assert result.nll == pytest.approx(exact, rel=1e-6)
    assert result.logits is None


def test_ties_rank_in_class_order_and_nan_is_wrong():
    logits = np.zeros((3, 10), np.float32)
    logits[2] = np.nan
    result = evaluate.accuracy(passes_on, ONE, logits, [0, 1, 0])
    assert (result.correct, result.correct_top5) == (1, 2)


def test_batches_change_nothing():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(23, 7)).astype(np.float32), rng.integers(0, 7, 23)
    whole = evaluate.accuracy(passes_on, ONE, logits, labels, batch_size=100, keep_logits=True)
    parts = evaluate.accuracy(passes_on, ONE, logits, labels, batch_size=5, keep_logits=True)
    assert (parts.correct, parts.correct_top5) == (whole.correct, whole.correct_top5)
    assert whole.correct == (logits.argmax(1) == labels).sum()
    np.testing.assert_array_equal(parts.logits, logits)


def test_prepare_sees_slices():
    seen = []

    def prepare(part):
        seen.append(len(part))
        return np.stack([np.full(4, x, np.float32) for x in part])

    evaluate.accuracy(passes_on, ONE, list(range(5)), [0] * 5, prepare=prepare, batch_size=2)
    assert seen == [2, 2, 1]


@pytest.mark.parametrize(
    "images, labels, says",
    [
        (np.zeros((2, 4)), [0], "2 images and labels"),
        (np.zeros((0, 4)), np.zeros(0, int), "no image"),
        (np.zeros((1, 4)), [0.5], "whole|integers"),
        (np.zeros((2, 4)), [0, 4], "the model has 4 classes"),
        (np.zeros((2, 4)), [-1, 2], "the model has 4 classes"),
        (np.zeros((2, 4, 3)), [0, 1], "gives logits"),
    ],
)
def test_bad_input(images, labels, says):
    with pytest.raises(DataError, match=says):
        evaluate.accuracy(passes_on, ONE, images, labels)


# -- labelled sets -----------------------------------------------------------------------------------------------------


def test_folder_with_labels(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "labels.csv").write_text("file,class_index,wnid,name\na.png,2,n1,cat\nb.png,0,n2,dog\n")
    images = evaluate.read_images(tmp_path)
    assert [p.name for p in images.images] == ["a.png", "b.png"] and list(images.labels) == [2, 0]
    assert images.classes == ("dog", "1", "cat") and len(images.first(1)) == 1


def test_folder_of_classes(tmp_path):
    for name in ("n02/b.JPEG", "n01/a.png", "n02/a.jpeg", "n02/notes.txt", ".cache/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "n00").mkdir()  # counts, as in a sample of a set
    images = evaluate.read_images(tmp_path)
    assert [str(p.relative_to(tmp_path)) for p in images.images] == ["n01/a.png", "n02/a.jpeg", "n02/b.JPEG"]
    assert list(images.labels) == [1, 2, 2] and images.classes == ("n00", "n01", "n02")
    (tmp_path / "empty/n00").mkdir(parents=True)
    with pytest.raises(DataError, match="1 folders and no image"):
        evaluate.read_images(tmp_path / "empty")


@pytest.mark.parametrize(
    "table, says",
    [
        (None, "no readable labels.csv"),
        ("", "needs the columns"),
        ("file,label\na.png,1\n", "needs the columns"),
        ("file,class_index\na.png,one\n", "no whole number"),
        ("file,class_index\nmissing.png,1\n", "missing.png"),
    ],
)
def test_folder_without_labels(tmp_path, table, says):
    if table is not None:
        (tmp_path / "labels.csv").write_text(table)
    with pytest.raises(DataError, match=says):
        evaluate.read_images(tmp_path)


def test_npz(tmp_path):
    path = tmp_path / "s.npz"
    np.savez(path, images=np.zeros((3, 4, 4), np.uint8), labels=np.array([0, 1, 1]), classes=np.array(["x", "y"]))
    images = evaluate.read_images(path)
    assert images.images.shape == (3, 4, 4) and images.classes == ("x", "y")
    for arrays, says in (
        ({"images": np.zeros((3, 4, 4), np.uint8)}, "needs the arrays"),
        ({"images": np.zeros((3, 4, 4)), "labels": np.zeros(3, int)}, "images are uint8"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(DataError, match=says):
            evaluate.read_images(path)
    path.write_bytes(b"PK no zip")
    with pytest.raises(DataError, match="not a readable"):
        evaluate.read_images(path)
    with pytest.raises(DataError, match="not a readable"):
        evaluate.read_images(tmp_path / "missing.npz")


# -- SQNR, recovery, progress ------------------------------------------------------------------------------------------


def test_sqnr():
    a = np.array([3.0, 4.0])
    assert evaluate.sqnr_db(a, a + [0.3, 0.4]) == pytest.approx(20.0)
    assert evaluate.sqnr_db(a, a) == math.inf and evaluate.sqnr_db(np.zeros(3), np.zeros(3)) == math.inf
    assert evaluate.sqnr_db(np.zeros(2), a) == -math.inf
    assert math.isnan(evaluate.sqnr_db(a, [3.0, np.nan])) and math.isnan(evaluate.sqnr_db([np.inf, 1.0], a))
    assert evaluate.sqnr_db(a * 1e200, (a + [0.3, 0.4]) * 1e200) == pytest.approx(20.0)
    assert evaluate.sqnr_db(a * 1e-200, (a + [0.3, 0.4]) * 1e-200) == pytest.approx(20.0)
    assert evaluate.sqnr_db(jnp.asarray(a, jnp.bfloat16), jnp.asarray(a, jnp.bfloat16)) == math.inf
    with pytest.raises(DataError, match="one shape"):
        evaluate.sqnr_db(a, a[:1])


def test_sqnr_of_what_can_be_dequantized():
    class Stored:
        def dequantize(self):
            return jnp.array([3.3, 4.4])

    assert evaluate.sqnr_db(np.array([3.0, 4.0]), Stored()) == pytest.approx(20.0, rel=1e-5)


def test_recovery_is_the_report_s():
    assert evaluate.recovery(5.0, 4.0, higher_is_better=False) == pytest.approx(80.0)


def test_progress(capsys):
    assert list(evaluate.track(range(3), "quiet", show=False)) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")
    assert list(evaluate.track(iter(range(3)), "counting", 3, show=True)) == [0, 1, 2]
    assert capsys.readouterr().out == ""  # whatever is drawn, stdout belongs to results
