"""The tuner: times the schedules of a kernel on the device at hand, and writes what was fastest.

    python -m qjax.kernels.tuning [--shapes 4096x4096,..] [--tokens 1,16,..] [--formats "int4 g128,.."] [--experts 8]
                                  [--seconds 300]

or ``qjax bench tune``. Products are gone through in the order given. For each, the kernel says by its `tuned.Key` what
it is and what its rule of thumb gives; its candidates are compiled, several at once, and timed one after the other.

Reproducible: same products, candidates, order and numbers; the median of the trials; and among schedules within `TIE`
of the fastest the simplest, which is that of the rule of thumb if it is one of them, else the one with the fewest
fields off their defaults, else the first. The file is written after each product, whole. What is in it already is not
measured again, so that a tuner which ran out of time goes on where it was.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from qjax.errors import DeviceError, QjaxError
from qjax.formats import Format
from qjax.kernels import tuned
from qjax.kernels.devices import device_kind
from qjax.kernels.dot import hopper, schedules
from qjax.kernels.registry import select
from qjax.kernels.samples import Product, arguments, format_named, function_of, problem_of, weights
from qjax.kernels.timing import device_seconds
from qjax.kernels.tuned import Key, Row

TIE = 0.01
"""Schedules within this share of the fastest time count as equally fast."""

COMPILERS = 8
"""Schedules that are compiled at once."""

SHAPES = ((4096, 4096), (28672, 4096), (4096, 14336), (57344, 8192), (8192, 8192), (12288, 4096))
"""(N, K) of layers of Llama that are tuned by default."""

EXPERTS = ((14336, 4096), (4096, 14336))
"""(N, K) of experts of Mixtral-8x7B, which are tuned where a number of experts is given and no shapes."""

TOKENS = (16, 1, 64, 32, 128, 256, 1024, 4096)
"""Tokens that are tuned by default, one of each `tuned.bucket`."""

FORMATS = ("int4 g128",)
"""Formats of weights that are tuned by default."""

Candidates = Callable[[Key, Any], list[Any]]


STEPS = {"words16": ((1, 1), (2, 1), (2, 2)), "codes4x8": ((1, 1), (2, 1), (2, 2)), "mixed16": ((1, 2), (2, 2))}
"""How tall and deep steps may be, by kernel; of others they are neither."""


def hopper_candidates(key: Key, heuristic: Any) -> list[Any]:
    """Return schedules that might be good on Hopper, that of the rule of thumb first.

    Tiles of as many tokens as there are, or the next size; K cut in up to 16 parts, as long as there are at most two
    blocks of threads for a processor; with kernels that take them, tall and deep steps, and sums that roll where
    registers hold no others. As many bytes under way as the rule of thumb has, and fewer, and more.
    """
    tiles = [t for t in hopper.TOKENS if t >= key.tokens][:2] or list(hopper.TOKENS[-2:])
    blocks = {tile: -(-key.tokens // tile) * key.matrices for tile in tiles}
    return _cut(key, heuristic, key.kernel, blocks, (1, 2, 3, 4, 6, 8, 12, 16))


def ragged_candidates(key: Key, heuristic: Any) -> list[Any]:
    """Return schedules of a ragged product that might be good on Hopper, that of the rule of thumb first.

    How many tokens an expert has is known at run time alone, so the size of a tile is a guess: those beside the rule of
    thumb's are tried. K is cut in up to 8 parts, as long as there are at most two blocks of threads for a processor
    where as many experts as can be have tokens.
    """
    filled, at = max(1, min(key.matrices, key.tokens)), hopper.TOKENS.index(heuristic.tokens)
    blocks = {tile: max(filled, key.tokens // tile) for tile in hopper.TOKENS[max(0, at - 1) : at + 2]}
    return _cut(key, heuristic, key.kernel.removeprefix("ragged_"), blocks, (1, 2, 4, 8))


def _cut(key: Key, heuristic: Any, kernel: str, blocks: dict[int, int], parts: Sequence[int]) -> list[Any]:
    """Schedules of tiles of so many tokens, of which there are so many."""
    steps = key.k // hopper.STEP
    held = heuristic.stages * heuristic.tall * heuristic.deep
    made = [heuristic]
    for tile, count in blocks.items():
        few = tile <= schedules.FEW
        for tall, deep in STEPS.get(kernel, ((1, 1),)):
            if key.n % (tall * hopper.WIDE) or (deep > heuristic.deep and not few):
                continue
            every = key.n // (tall * hopper.WIDE) * count
            for part in parts:
                if steps % (part * deep) or (part > 1 and part * every > 2 * schedules.PROCESSORS):
                    continue
                for stages in dict.fromkeys(max(2, held // (tall * deep) + change) for change in (-2, 0, 2)):
                    rolling = kernel == "words16" and tall > 1 and not few
                    made.append(hopper.Schedule(tile, stages, part, tall, deep, rolling))
    return made


CANDIDATES: dict[str, Candidates] = {"ragged_words16": ragged_candidates}
"""By kernel, where it has candidates of its own; others have those of `hopper_candidates`."""


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What came of one product.

    Attributes:
        product: what was tuned.
        row: the result, as it is stored.
        tried: ``[(schedule, microseconds or why it cannot run)]``, in order.
    """

    product: Product
    row: Row
    tried: tuple[tuple[Any, float | str], ...]


def products(
    formats: Sequence[Format],
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    dtype: str = "bfloat16",
    experts: int | None = None,
) -> list[Product]:
    """Return all combinations, the tokens of a layer one after the other, so that its weights are made once."""
    return [Product(f, n, k, t, dtype=dtype, experts=experts) for f in formats for n, k in shapes for t in tokens]


def tune(
    products: Sequence[Product],
    path: str | Path,
    *,
    implementation: str = "mosaic",
    seconds: float = float("inf"),
    again: bool = False,
    trials: int = 7,
    clock: Callable[..., float] = device_seconds,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[Tuned]:
    """Tune products on the device at hand, one after the other, and write each result.

    Args:
        products: in the order in which they are tuned.
        path: file to write; what it has of others is kept.
        implementation: name of the lowering.
        seconds: after which no further product is begun.
        again: measure also what the file has.
        trials: rounds of each time.
        clock: as `qjax.kernels.timing.device_seconds`.
        say: told what cannot be tuned, and why.

    Yields:
        What came of each product that was measured.

    Raises:
        DeviceError: there is no CUDA device, or the file is damaged.
    """
    kind = device_kind()
    if kind is None:
        raise DeviceError(f"there is nothing to tune on {jax.devices()[0].device_kind}: no kernel for it has schedules")
    rows = dict(tuned.read(path).get(kind, {})) if Path(path).exists() else {}
    end = time.perf_counter() + seconds
    for number, product in enumerate(products):
        if time.perf_counter() > end:
            say(f"the time is up: {len(products) - number} of {len(products)} products are left; run it again")
            return
        try:
            found = _tune(product, implementation, rows.keys() if not again else (), trials, clock)
        except QjaxError as e:
            say(f"{product}: {e}")
            continue
        if found is None:
            continue
        rows[found.row.key] = found.row
        measured = f"{datetime.date.today().isoformat()}, jax {jax.__version__}"
        tuned.write(path, kind, list(rows.values()), measured)
        yield found


def _tune(product: Product, implementation: str, known: Any, trials: int, clock: Callable[..., float]) -> Tuned | None:
    """Tune one product; None if its result is known."""
    (like,) = _weights(product, 1) if known else _weights(product)[:1]
    problem = problem_of(product, like)
    lowering = select(problem, implementation)
    arrays = jax.eval_shape(lambda: arguments(product, [like])[0])
    with tuned.asked() as questions:
        jax.eval_shape(function_of(lowering, problem), *arrays)
    if not questions:
        raise DeviceError(f"its {implementation} kernel asks for no schedule, so there is nothing to tune")
    key, heuristic = questions[0]
    if key in known:
        return None
    sets = arguments(product, _weights(product))
    schedules = list(dict.fromkeys([heuristic, *CANDIDATES.get(key.kernel, hopper_candidates)(key, heuristic)]))

    def lower(schedule: Any) -> Any:
        with tuned.forced(schedule, key.kernel):
            return jax.jit(function_of(lowering, problem)).lower(*sets[0])

    tried: list[tuple[Any, float | str]] = []
    for schedule, compiled in _compiled(schedules, lower):
        result: float | str = compiled if isinstance(compiled, str) else ""
        if not result:
            try:
                result = round(clock(compiled, sets, trials=trials) * 1e6, 3)
            except Exception as failure:  # such as more memory than there is: the others are worth having
                result = _reason(failure)
        tried.append((schedule, result))
    times = {schedule: t for schedule, t in tried if isinstance(t, float)}
    if not times:
        raise DeviceError(f"no schedule runs; the first of {len(tried)}: {tried[0][1]}")
    best = choose(times, heuristic)
    row = Row(key, dataclasses.asdict(best), times[best], times.get(heuristic, times[best]))
    return Tuned(product, row, tuple(tried))


def _weights(product: Product, count: int | None = None) -> list[Any]:
    return weights(product.weight, product.n, product.k, True, count, product.act, product.experts)


def _compiled(schedules: Sequence[Any], lower: Callable[[Any], Any]) -> Iterator[tuple[Any, Any]]:
    """Yield ``(schedule, compiled or why not)``, in order. Lowering is Python's, one at a time; compiling is not."""
    with concurrent.futures.ThreadPoolExecutor(COMPILERS) as pool:
        waiting: list[tuple[Any, Any]] = []
        for schedule in schedules:
            try:
                waiting.append((schedule, pool.submit(lower(schedule).compile)))
            except Exception as failure:  # the shape forbids it, or shared memory does
                waiting.append((schedule, _reason(failure)))
        for schedule, result in waiting:
            if isinstance(result, str):
                yield schedule, result
                continue
            try:
                yield schedule, result.result()
            except Exception as failure:
                yield schedule, _reason(failure)


def _reason(failure: Exception) -> str:
    return f"{type(failure).__name__}: {str(failure)[:150]}"


def choose(times: dict[Any, float], heuristic: Any) -> Any:
    """Return the schedule to take: the simplest of those within `TIE` of the fastest. See the module."""
    limit = min(times.values()) * (1 + TIE)
    good = [schedule for schedule, t in times.items() if t <= limit]
    return heuristic if heuristic in good else min(good, key=_off_default)  # the first, if several are as simple


def _off_default(schedule: Any) -> int:
    return sum(getattr(schedule, f.name) != f.default for f in dataclasses.fields(schedule))


# The command line.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the tuner's own arguments."""
    parser.add_argument("--shapes", type=shapes, default=SHAPES, metavar="NxK,..", help="layers (default: Llama's)")
    parser.add_argument("--tokens", type=numbers, default=TOKENS, metavar="T,..", help="(default: 1 to 4096)")
    parser.add_argument("--formats", default=",".join(FORMATS), metavar="F,..", help="of weights (default: int4 g128)")
    parser.add_argument(
        "--experts", type=int, metavar="E", help="ragged products of so many experts; tokens are of all"
    )
    parser.add_argument("--dtype", default="bfloat16", help="of activations (default: bfloat16)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="(default: the file of this device in qjax)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which nothing further is begun")
    parser.add_argument("--again", action="store_true", help="measure also what the file has")


def shapes(text: str) -> tuple[tuple[int, int], ...]:
    """Read ``4096x4096,28672x4096``."""
    pairs = [tuple(map(int, part.split("x"))) for part in text.split(",")]
    if any(len(pair) != 2 or min(pair) < 1 for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text} is no list of shapes such as 4096x4096,28672x4096")
    return tuple(pairs)  # type: ignore[return-value]


def numbers(text: str) -> tuple[int, ...]:
    """Read ``1,16,256``."""
    found = tuple(map(int, text.split(",")))
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no list of positive numbers")
    return found


def run(args: argparse.Namespace, say: Callable[[str], None] = print) -> list[Tuned]:
    """Tune as the arguments say, and say what came of it."""
    kind = device_kind()
    path = args.out or Path(tuned.__file__).parent / tuned.file_name(kind or "none")
    formats = [format_named(name) for name in args.formats.split(",")]
    layers = EXPERTS if args.experts and args.shapes is SHAPES else args.shapes
    todo = products(formats, layers, args.tokens, args.dtype, args.experts)
    out = []
    for one in tune(todo, path, seconds=args.seconds, again=args.again, say=say):
        row = one.row
        ran = sum(isinstance(t, float) for _, t in one.tried)
        say(
            f"{row.key}: {row.us:.1f} us by {dict(row.schedule)}, {row.heuristic_us / row.us:.2f} x the rule of thumb "
            f"({ran} of {len(one.tried)} schedules ran)"
        )
        out.append(one)
    say(f"{len(out)} results written to {path}" if out else f"nothing new for {path}")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tuner as a program."""
    parser = argparse.ArgumentParser(
        "python -m qjax.kernels.tuning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    try:
        run(parser.parse_args(argv), lambda text: print(text, flush=True))
    except QjaxError as e:
        print(f"tuning: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
