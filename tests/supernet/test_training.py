"""Training of supernets: steps, resume, meshes, batch norms."""

import csv
import functools
import importlib.util
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.errors import CheckpointError, DataError, QjaxError, RecipeError
from qjax.evaluate import logit_divergence
from qjax.models import CifarClassifier, CifarResNetConfig
from qjax.supernet import Descending, Fixed, Sandwich, Schedule, Space, load_trained, recalibrate, train

SPACE = Space((2, 8), (2, 8), (True,), (True,), (True,), ends=None)
SCHEDULE = Schedule(6, learning_rate=3e-2, steps_rate=1e-2)


def network(p, x):
    """Two layers."""
    return jnp.tanh(x @ p["a"]) @ p["b"]


def weights():
    k = jax.random.split(jax.random.key(0), 2)
    return {"a": jax.random.normal(k[0], (6, 16)) * 0.5, "b": jax.random.normal(k[1], (16, 3)) * 0.5}


def batches(step):
    x = np.random.default_rng(step).standard_normal((16, 6)).astype(np.float32)
    return (x,), (x[:, 0] > 0).astype(np.int32) + (x[:, 1] > 0.5)


@pytest.fixture(scope="module")
def job():
    t = qjax.elastic(network, SPACE)
    p = weights()
    state = t.init(p, *batches(0)[0])
    return t, p, state, train(t, p, state, batches, SCHEDULE)


def same(a, b, **tolerance):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


def test_it_learns_and_goes_on_exactly_where_it_was_killed(job, tmp_path):
    t, p, state, alone = job
    assert set(alone.metrics) == {"loss", "highest", "random1", "lowest", "wdr"}
    assert alone.metrics["highest"][-1] < 0.75 * alone.metrics["highest"][0]
    assert all(
        (np.asarray(alone.state["a"][f]) != state["a"][f]).any() for f in ("weight.scale.channel", "input.scale")
    )
    untouched = np.asarray(alone.state["b"]["weight.scale.channel"] == state["b"]["weight.scale.channel"])
    assert untouched[:, 1:-1].all() and not untouched[:, [0, -1]].all()  # only 2 and 8 bits are in the space

    class Killed(Exception):
        pass

    def killer(done, total, metrics):
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        train(t, p, state, batches, SCHEDULE, folder=tmp_path, save_every=2, progress=killer)
    seen = []
    again = train(t, p, state, batches, SCHEDULE, folder=tmp_path, save_every=2, progress=lambda n, *_: seen.append(n))
    assert seen == [5, 6]  # what was after the last checkpoint is done once more
    same((again.params, again.state, dict(again.metrics)), (alone.params, alone.state, dict(alone.metrics)), rtol=0)
    with (tmp_path / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["step"] for row in table] == list("123456")
    np.testing.assert_allclose([float(row["loss"]) for row in table], alone.metrics["loss"])
    said, read = load_trained(tmp_path, network, jax.eval_shape(weights), *batches(0)[0])
    same((read.params, read.state, dict(read.metrics)), (alone.params, alone.state, dict(alone.metrics)), rtol=0)
    assert said.space == SPACE and jax.tree.structure(read.state) == jax.tree.structure(state)
    with pytest.raises(CheckpointError, match=r"other sites \(2 there, 1 here\)"):
        load_trained(tmp_path, lambda p, x: x @ p["a"], p, *batches(0)[0])
    with pytest.raises(CheckpointError, match="other shapes"):
        load_trained(tmp_path, network, p | {"b": p["b"][:, :2]}, *batches(0)[0])
    with pytest.raises(CheckpointError, match="holds no supernet"):
        load_trained(tmp_path / "training", network, p, *batches(0)[0])
    other = qjax.elastic(network, Space((2, 4), (2, 8), (True,), (True,), (True,), ends=None))
    with pytest.raises(CheckpointError, match=r"space differ; .*space\.[a-z_]+: .+ there, .+ here"):
        train(other, p, state, batches, SCHEDULE, folder=tmp_path)


def test_the_float_model_teaches_the_highest_subnet(job):
    t, p, state, _ = job
    x = jax.random.normal(jax.random.key(5), (4, 3, 6))
    schedule = Schedule(2, sampling=Sandwich(2), lam=1.0, wdr=0)
    teacher = functools.partial(network, p)
    done = train(t, p, state, lambda n: ((x,), np.zeros((4, 3), np.int32)), schedule, teacher=teacher)
    highest, lowest = (t.apply(p, state, t.domain(p, x).uniform(bits), x)[0] for bits in (8, 2))
    np.testing.assert_allclose(done.metrics["highest"][0], logit_divergence(teacher(x), highest).kl, rtol=1e-3)
    np.testing.assert_allclose(done.metrics["lowest"][0], logit_divergence(highest, lowest).kl, rtol=1e-3)


@pytest.mark.slow
def test_it_is_the_same_over_the_devices_of_a_mesh(job):
    t, p, state, alone = job
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = train(t, p, state, batches, SCHEDULE, mesh=mesh)
    same(spread.params, alone.params, atol=2e-3)
    assert spread.params["a"].sharding.is_fully_replicated and len(spread.params["a"].devices()) == 8
    with pytest.raises(DataError, match="a batch of 12 examples does not split over 8 devices"):
        train(t, p, state, lambda n: jax.tree.map(lambda a: a[:12], batches(n)), SCHEDULE, mesh=mesh)


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_it_and_keeps_the_last_checkpoint(job, tmp_path):
    t, p, state, _ = job

    def poisoned(step):
        (x,), y = batches(step)
        return (x if step < 4 else x * np.float32(np.nan),), y

    with pytest.raises(
        DataError, match=r"step 5: the loss is not finite .*a: NaN or infinity among its inputs; the last"
    ):
        train(t, p, state, poisoned, SCHEDULE, folder=tmp_path, save_every=2)
    seen = []
    train(t, p, state, batches, SCHEDULE, folder=tmp_path, progress=lambda n, *_: seen.append(n))
    assert seen == [5, 6]
    with pytest.raises(DataError, match="a: NaN or infinity in its weight"):
        train(t, {**p, "a": p["a"].at[0, 0].set(jnp.nan)}, state, batches, SCHEDULE)
    for wrong in (
        lambda: Schedule(0),
        lambda: Sandwich(0),
        lambda: Descending(until=0),
        lambda: Schedule(3, sampling=3),
        lambda: Schedule(3, lam=2),
    ):
        with pytest.raises(RecipeError, match="Schedule|Sandwich|Descending"):
            wrong()


def test_batch_norms_are_calibrated_for_a_subnet():
    model = CifarClassifier(CifarResNetConfig(1, widths=(4,), image_size=(8, 8), num_classes=3))
    params = model.init(0)
    x = jax.random.normal(jax.random.key(1), (5, 6, 8, 8, 3)) * 2 + 1
    t = qjax.elastic(model.train_step_stats, Space((2, 8), (4, 8)))
    state, domain = t.init(params, x[0]), t.domain(params, x[0])
    choice = domain.uniform(2, 4)
    recalibrated = jax.jit(lambda p, c, x: recalibrate(t, p, state, c, x))
    got = recalibrated(params, choice, x)
    # The statistics of a batch are what is added to a tenth: momentum is 0.1.
    step = jax.jit(lambda p, x: t.apply(p, state, choice, x)[0][1])
    each = [jax.tree.map(lambda a, b: b + (a - b) / 0.1, step(params, batch), params) for batch in x]
    share = 0.9 ** np.arange(5)[::-1]
    want = jax.tree.map(lambda *a: sum(s * b for s, b in zip(share / share.sum(), a, strict=True)), *each)
    same(got, want, rtol=1e-3, atol=1e-4)
    same(recalibrated(params, choice, x[:1]), each[0], rtol=1e-3, atol=1e-4)
    far = jax.tree.map(lambda a, b: 7 * a + 3 if (np.asarray(a) != b).any() else a, params, got)
    same(recalibrated(far, choice, x), got, rtol=1e-3, atol=1e-3)  # wherever they begin
    many = recalibrated(params, choice, jnp.concatenate([x] * 40))
    now = params
    for batch in [*x] * 40:
        now = step(now, batch)
    same(many, now, rtol=1e-4, atol=1e-5)  # after so many it is the moving average itself
    assert any((np.asarray(a) != b).any() for a, b in zip(*map(jax.tree.leaves, (got, params)), strict=True))
    evaluated = qjax.elastic(model, t.space)
    assert evaluated.domain(params, x[0]) == domain  # one state for training and evaluation
    with pytest.raises(DataError, match="no moved statistics"):
        recalibrate(evaluated, params, state, choice, x)


def test_what_a_step_runs_is_data():
    domain = Space((2, 4, 8), (2, 4, 8, 0), ends=None).domain(["a", "b", "c"])
    key = jax.random.key(3)
    high, _, low = (np.asarray(c) for c in Sandwich().choices(key, 0.0, domain))
    assert (high[:, :2] == (8, 0)).all() and (low[:, :2] == 2).all()
    assert Sandwich(4).names == ("highest", "random1", "random2", "lowest") and Sandwich(1).names == ("highest",)

    at = jax.jit(lambda k, progress: jnp.stack(Descending(3, until=0.5).choices(k, progress, domain)))
    first, some, last = ([np.asarray(at(jax.random.key(n), p)) for n in range(20)] for p in (0.0, 0.3, 0.5))
    assert all((c[:, :, :2] == (8, 0)).all() for c in first)
    floors = (8 - 0.6 * 6, 9 - 0.6 * 7)  # 4.4 and 4.8, so that 8 bits are the fewest
    assert {int(v) for c in some for v in c[1:, :, 0].ravel()} == {8} and floors[0] > 4
    assert {int(v) for c in some for v in c[1:, :, 1].ravel()} == {8, 0} and floors[1] > 4
    assert all((c[2, :, :2] == 2).all() for c in last)
    np.testing.assert_array_equal(last[0], np.stack(Sandwich().choices(jax.random.key(0), 0.5, domain)))

    (only,) = Fixed(4, 0, (False, True, False)).choices(key, 0.7, domain)
    np.testing.assert_array_equal(only, [[4, 0, 0, 1, 0]] * 3)


def test_a_network_for_one_form_moves_its_own_tables_alone(job, tmp_path):
    t, p, state, _ = job
    schedule = Schedule(2, sampling=Fixed(2), wdr=0.0)
    train(t, p, state, batches, schedule, folder=tmp_path)
    done = train(t, p, state, batches, schedule, folder=tmp_path)  # nothing is left to do
    assert set(done.metrics) == {"loss", "fixed"}
    moved = np.asarray(done.state["a"]["weight.scale.channel"] != state["a"]["weight.scale.channel"])
    assert moved[:, 0].any() and not moved[:, 1:].any()


def events_in(folder):
    """What the event files hold, by their format: length, masked CRC-32C of it, record, masked CRC-32C of that."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    table = [functools.reduce(lambda c, _: (c >> 1) ^ (0x82F63B78 if c & 1 else 0), range(8), n) for n in range(256)]

    def masked(data):
        crc = functools.reduce(lambda c, b: table[(c ^ b) & 0xFF] ^ (c >> 8), data, 0xFFFFFFFF) ^ 0xFFFFFFFF
        return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF

    shown = {}
    for file in sorted(folder.glob("events.out.tfevents.*"), key=lambda f: int(f.suffix[1:])):
        data = file.read_bytes()
        while data:
            (length,), (check,) = struct.unpack("<Q", data[:8]), struct.unpack("<I", data[8:12])
            record, (own,) = data[12 : 12 + length], struct.unpack("<I", data[12 + length : 16 + length])
            assert check == masked(data[:8]) and own == masked(record)
            event, data = Event.FromString(record), data[16 + length :]
            if event.session_log.status == SessionLog.START:  # what TensorBoard drops
                shown = {step: v for step, v in shown.items() if step < event.step}
            if event.summary.value:
                assert event.step not in shown and event.wall_time > 1e9
                shown[event.step] = {v.tag: v.simple_value for v in event.summary.value}
    return shown


def test_metrics_are_event_files_that_a_killed_job_continues(job, tmp_path):
    pytest.importorskip("tensorboardX", reason="it comes with qjax[tensorboard]")
    t, p, state, _ = job
    schedule = Schedule(6, sampling=Fixed(2), wdr=0.0)

    def killer(done, *_):
        if done == 5:
            raise KeyboardInterrupt

    how = {"folder": tmp_path, "save_every": 2}
    with pytest.raises(KeyboardInterrupt):
        train(t, p, state, batches, schedule, **how, tensorboard=True, progress=killer)
    assert len(events_in(tmp_path / "events")) == 5
    done = train(t, p, state, batches, schedule, **how, tensorboard=True)
    shown = events_in(tmp_path / "events")
    assert list(shown) == [1, 2, 3, 4, 5, 6]
    for name, values in done.metrics.items():
        np.testing.assert_allclose([shown[n + 1][name] for n in range(6)], values, rtol=1e-6)
    for file in (tmp_path / "events").iterdir():
        file.unlink()
    train(t, p, state, batches, schedule, **how, tensorboard=True)  # asked for later: from the metrics at hand
    assert events_in(tmp_path / "events") == shown


def test_event_files_that_cannot_be_are_refused_before_anything_is_done(job, tmp_path, monkeypatch):
    t, p, state, _ = job
    if importlib.util.find_spec("tensorboardX"):
        with pytest.raises(QjaxError, match="give folder="):
            train(t, p, state, batches, SCHEDULE, tensorboard=True)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install 'qjax\[tensorboard\]'"):
        train(t, p, state, batches, SCHEDULE, folder=tmp_path, tensorboard=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (
            lambda x, y: ((x,), np.eye(3, dtype=np.float32)[y]),
            r"float32 \[16, 3\] .* shape \[16\], are needed \(of",
        ),
        (lambda x, y: ((x,), y[:, None]), r"labels are int32 \[16, 1\] and logits \[16, 3\]"),
        (lambda x, y: ((x,), y[:8]), r"labels are int32 \[8\]"),
        (lambda x, y: ((x,), y.astype(np.float32)), "labels are float32"),
        (lambda x, y: ((x,), y + 1), r"labels of batches\(0\) are from 1 to 3, and the function has 3 classes"),
        (lambda x, y: ((x,), y - 100), "from -100 to"),
        (lambda x, y: (x, y), r"batches\(0\) gave a ndarray and labels; \(\(arguments...\), labels\) is needed"),
        (lambda x, y: x, r"batches\(0\) gave a ndarray"),
    ],
)
def test_batches_that_cannot_be_are_named(job, wrong, words):
    t, p, state, _ = job
    with pytest.raises(DataError, match=words):
        train(t, p, state, lambda step: wrong(batches(step)[0][0], batches(step)[1]), SCHEDULE)


def test_batches_are_a_function(job):
    t, p, state, _ = job
    with pytest.raises(DataError, match="batches is a list; a function of the number"):
        train(t, p, state, [batches(0)], SCHEDULE)


def test_recalibration_says_that_batches_have_an_axis():
    model = CifarClassifier(CifarResNetConfig(1, widths=(4,), image_size=(8, 8), num_classes=3))
    t = qjax.elastic(model.train_step_stats, SPACE)
    images = np.random.default_rng(0).random((6, 8, 8, 3), np.float32)
    p = model.init(0)
    state = t.init(p, images)
    with pytest.raises(DataError, match=r"parts of these arguments \(\[6, 8, 8, 3\]\): each has the axis of batches"):
        recalibrate(t, p, state, t.domain(p, images).uniform(8), images)
    with pytest.raises(DataError, match=r"\(\[2, 6, 8, 8, 3\], \[3\]\): each has the axis of batches"):
        two = qjax.elastic(lambda p, x, scale: model.train_step_stats(p, x * scale), SPACE)
        recalibrate(two, p, state, t.domain(p, images).uniform(8), np.stack([images] * 2), np.ones(3, np.float32))


def test_data_that_are_not_finite_are_named(job):
    t, p, state, _ = job

    def broken(step):
        (x,), y = batches(step)
        return (np.where(step == 2, np.nan, x).astype(np.float32),), y

    with pytest.raises(
        DataError, match=r"step 3: .*a: NaN .*; batches\(2\) has NaN or infinity among its arguments: mend"
    ):
        train(t, p, state, broken, SCHEDULE)


def test_channels_that_are_always_zero_have_no_negative_variance():
    """However large the variance is that a subnet begins with; a count beside it goes on."""

    def fn(p, x):
        y = x @ p["w"]
        mean, var = y.mean(0), y.var(0)
        moved = {"mean": 0.9 * p["mean"] + 0.1 * mean, "var": 0.9 * p["var"] + 0.1 * var, "count": p["count"] + 1}
        return (y - mean) / jnp.sqrt(var + 1e-5) @ p["v"], {**p, **moved}

    p = {"w": jnp.zeros((4, 8)).at[:, 0].set(1.0), "v": jnp.ones((8, 3)), "mean": jnp.full(8, -7.0)}
    p |= {"var": jnp.linspace(1.0, 1e6, 8), "count": jnp.float32(5)}
    x = jax.random.normal(jax.random.key(0), (3, 16, 4))
    t = qjax.elastic(fn, SPACE)
    own = recalibrate(t, p, t.init(p, x[0]), t.domain(p, x[0]).uniform(8), x)
    assert (own["var"][1:] == 0).all() and own["var"][0] > 0 and float(own["count"]) == 8
    np.testing.assert_allclose(own["mean"][1:], 0)
