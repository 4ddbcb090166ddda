"""The arguments of every command, with examples. Only argparse is imported here."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = """\
Quantize JAX models from Hugging Face folders, measure what it costs, and run them.

A FOLDER is a Hugging Face model folder (config.json, safetensors, tokenizer.json) or one that `qjax quantize` wrote."""

EXAMPLES = """\
examples:
  qjax recipes                                          the presets
  qjax inspect models/stories260k                       what can be quantized
  qjax quantize models/stories260k --recipe W8A16       writes ./stories260k-W8A16
  qjax eval stories260k-W8A16 --text stories.txt        perplexity, KL to the float model, agreement
  qjax eval vit-tiny-W8A8 --images imagenet-sample      top-1 and top-5
  qjax study models/stories260k --recipes W8A16,W4A16 --text stories.txt
                                                        recipes side by side
  qjax generate stories260k-W8A16 --prompt "Once upon a time"
  qjax advise models/llama --device h200 --workload chat  which format to deploy
  qjax search models/stories260k --budget "6 bits" --text stories.txt
                                                        a format for each layer, within a budget
  qjax bench kernels                                    how fast quantized products are on this device

Each command has its own examples: qjax quantize --help. With --json, stdout is one JSON object. QJAX_DEBUG=1 shows
tracebacks."""


def build_parser(version: str) -> argparse.ArgumentParser:
    """The whole command line. The chosen command's name is in ``args.command``."""
    parser = argparse.ArgumentParser("qjax", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=_Raw)
    parser.add_argument("--version", action="version", version=f"qjax {version}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for add in (_inspect, _quantize, _eval, _study, _generate, _recipes, _advise, _search, _bench):
        add(commands)
    return parser


class _Raw(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=100)


def _command(
    commands: argparse._SubParsersAction, name: str, summary: str, more: str, examples: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.{more}",
        epilog=f"examples:\n{examples}",
        formatter_class=_Raw,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else there")
    return parser


def _inspect(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "inspect",
        "list the sites of a model: what can be quantized, and how large it is",
        " For a quantized folder: its report.",
        "  qjax inspect models/stories260k\n"
        "  qjax inspect models/stories260k --recipe W4A16       what this recipe would store, without doing it\n"
        "  qjax inspect stories260k-W4A16                       the report of a quantized folder\n"
        "  qjax inspect models/stories260k --json | jq '.sites[].name'",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--recipe", help="preset in any case (`qjax recipes` lists them), or a .toml file: also say what it would do"
    )


def _quantize(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "quantize",
        "quantize a model and save it as a folder that needs nothing else",
        "\nThe folder holds the packed weights, config and tokenizer, and the report as text, JSON and HTML.",
        "  qjax quantize models/stories260k --recipe W8A16                 writes ./stories260k-W8A16\n"
        "  qjax quantize models/stories260k --recipe W4A16 --out small --text stories.txt\n"
        "                                                 and compare with the float model on a text\n"
        "  qjax quantize models/vit-tiny --recipe W8A8 --images imagenet-sample\n"
        "  qjax quantize models/vit-tiny --recipe FP8 --calibration imagenet-sample --samples 32\n"
        "                                                 constant activation scales, from 32 of the images\n"
        "  qjax quantize models/stories260k --recipe mine.toml\n"
        "  qjax quantize models/llama --recipe gptq.toml --calibration text.txt --resume job --low-memory\n"
        "                                                 one layer at a time; killed, it goes on where it was",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="Hugging Face model folder with float weights")
    parser.add_argument(
        "--recipe", required=True, help="preset in any case (`qjax recipes` lists them), or a .toml file"
    )
    parser.add_argument(
        "--out", type=Path, help="folder to write (default: ./NAME-RECIPE); an older qjax folder is replaced"
    )
    _calibrating(
        parser,
        "text or images to calibrate on, for recipes that look at activations: constant scales (FP8), roundings with"
        " data (W4A16_INT: GPTQ, AWQ, ..), prepare passes (SmoothQuant)",
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="DIR",
        help="keep finished layers here while calibrating, and go on from there after a kill",
    )
    parser.add_argument(
        "--low-memory", action="store_true", help="read the weights of one layer at a time, never the whole model"
    )
    _data(
        parser,
        "also compare with the float model on this text: perplexity, KL divergence, agreement",
        "also compare with the float model on these images",
    )


def _eval(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "eval",
        "score a model on a text (perplexity) or on labelled images (top-1, top-5)",
        "\nFor a quantized folder whose float model is still where it was, the float score, KL divergence and top-1"
        "\nagreement are measured too, and the folder's report is brought up to date."
        "\n\nJSON keys: perplexity, nll, tokens; top1 and top5 from 0 to 1, correct, images; where compared: kl,"
        "\nagreement, recovery (percent), float_perplexity or float_top1.",
        "  qjax eval models/stories260k --text stories.txt\n"
        "  qjax eval stories260k-W4A16 --text book.txt --protocol B\n"
        "  qjax eval vit-tiny-W8A8 --images imagenet/val          a folder for each class, labels.csv, or .npz\n"
        "  qjax eval stories260k-W4A16 --text stories.txt --json | jq .perplexity",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    _data(
        parser,
        "UTF-8 text to score",
        "labelled images: a folder with labels.csv or with a folder for each class, or an .npz file",
    )
    parser.add_argument("--no-float", action="store_true", help="do not compare with the float model")


def _study(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "study",
        "compare recipes on a model: what each keeps of the scores, and what it stores",
        "\nEach recipe is applied and scored beside the float model; tables, plots, paired tests are written. A study"
        "\nthat was killed goes on where it was, and a finished one takes more recipes. Rows drawn for calibration are"
        "\nnever scored.",
        "  qjax study models/llama --text stories.txt --calibration book.txt\n"
        "                                                 the three formats of arXiv 2411.02355\n"
        "  qjax study models/llama --recipes W8A16,W4A16,NF4,mine.toml --text stories.txt book.txt --out study\n"
        "  qjax study models/vit-tiny --images imagenet-sample --calibration imagenet-sample --samples 32\n"
        "  qjax study models/all-minilm-l6-v2 --recipes W8A8,W4A16 --text stories.txt\n"
        "                                                 256 pairs of sentences: how far their cosines move",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="Hugging Face model folder with float weights")
    _recipes_argument(parser, "W8A8_FP,W8A8_INT,W4A16_INT")
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="UTF-8 texts to score on, each a task; of a text encoder their sentences in pairs",
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="labelled images to score on")
    _calibrating(parser, "text or images for recipes that need calibration data")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the study (default: ./NAME-study)")
    _cut(parser)


def _generate(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "generate",
        "continue a prompt",
        "",
        '  qjax generate models/stories260k --prompt "Once upon a time"\n'
        '  qjax generate stories260k-W4A16 --prompt "Once" --max-tokens 200 --temperature 0.8 --seed 1\n'
        '  echo "Once upon a time" | qjax generate stories260k-W4A16 --prompt -',
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--prompt", required=True, help="text to continue; - reads it from stdin")
    parser.add_argument(
        "--max-tokens", type=_positive, default=128, metavar="N", help="at most so many new tokens (default: 128)"
    )
    parser.add_argument(
        "--temperature", type=_temperature, default=0.0, metavar="T", help="0 takes the likeliest token (default: 0)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of the draws when the temperature is not 0 (default: 0)"
    )


def _recipes(commands: argparse._SubParsersAction) -> None:
    _command(commands, "recipes", "list the presets", "", "  qjax recipes\n  qjax recipes --json")


def _advise(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "advise",
        "say which format to deploy a decoder in, on a device and for a workload",
        "\nA roofline with memory, the number of devices and published recoveries: nothing is run. Weights need not be"
        "\nthere, config.json suffices; or give sizes as numbers. Figures are those of a model of servers: where the"
        "\nmargin is below 10 % the answer is to measure.",
        "  qjax advise models/llama-8b --device h200 --workload chat\n"
        "  qjax advise models/llama-70b --device a100 --workload rag --mode async --recovery 99\n"
        "  qjax advise models/llama-70b --device h100 --price 2.5 --mode rate --rate 20 --latency 10\n"
        "  qjax advise --parameters 70.6e9 --layers 80 --kv-heads 8 --head-dim 128 --device mine.toml\n"
        "  qjax advise models/llama-8b --device l40s --measured-recovery W4A16-INT=98.7 --json\n"
        "  qjax advise --device list                              the devices that there are",
    )
    parser.add_argument("folder", type=Path, metavar="MODEL", nargs="?", help="Hugging Face folder of a decoder")
    parser.add_argument("--device", required=True, help="name of a device, a .toml file, or 'list'")
    parser.add_argument(
        "--workload", default="chat", help="name, or tokens as PROMPT/OUTPUT (default: chat, which is 512/256)"
    )
    parser.add_argument(
        "--mode",
        choices=("sync", "async", "rate"),
        default="sync",
        help="one query at a time; as many as fit; or a given --rate (default: sync)",
    )
    parser.add_argument("--rate", type=float, metavar="Q", help="queries a second that have to be served")
    parser.add_argument("--latency", type=float, metavar="S", help="most seconds of a query")
    parser.add_argument(
        "--recovery", type=float, default=0.0, metavar="R", help="least percent of the float model's scores"
    )
    parser.add_argument("--price", type=float, metavar="P", help="of a device per hour, in any currency")
    parser.add_argument("--devices", type=_positive, metavar="N", help="run each copy on so many (default: the best)")
    parser.add_argument(
        "--concurrency", type=_positive, default=1, metavar="N", help="sequences that have to fit at a time"
    )
    parser.add_argument(
        "--max-batch", type=_positive, default=256, metavar="N", help="most sequences at a time (default: 256)"
    )
    parser.add_argument("--formats", metavar="F,F", help="choose among these only (default: those of the format study)")
    parser.add_argument(
        "--measured-recovery",
        action="append",
        default=[],
        metavar="F=R",
        help="recovery of a format in percent, measured on this model; may be repeated",
    )
    parser.add_argument(
        "--measured",
        type=Path,
        action="append",
        metavar="FILE|DIR",
        help="JSON with measured query times, to calibrate on (default: benchmarks/results of a checkout)",
    )
    sizes = parser.add_argument_group("sizes, where there is no folder")
    sizes.add_argument("--parameters", type=float, metavar="P", help="all parameters, such as 70.6e9")
    sizes.add_argument("--layers", type=_positive, metavar="N")
    sizes.add_argument("--kv-heads", type=_positive, metavar="N")
    sizes.add_argument("--head-dim", type=_positive, metavar="N")
    sizes.add_argument(
        "--kept", type=float, default=0.0, metavar="P", help="parameters of embeddings and head, which stay 16-bit"
    )
    sizes.add_argument("--context", type=_positive, metavar="N", help="most tokens that a sequence may have")


def _search(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "search",
        "choose a format for each layer within a budget, by measured sensitivities",
        "\nMeasures how far the outputs move when one layer alone is quantized, for every layer and choice; then"
        "\nchooses exactly. No quantization is always a choice. With --generations NSGA-II goes on, measuring"
        "\nwhole assignments on the same data. The folder gets recipe.toml for `qjax quantize`,"
        "\nsensitivities.json, front.json and front.svg. Killed, it goes on where it was; another budget on the same"
        "\nfolder measures nothing again."
        "\n\nWith --supernet the choices are subnets of a trained supernet (the folder= of qjax.supernet.train): each"
        "\nis run, top-1 or cross-entropy, or with --predictor N so many are run and the others predicted. The folder"
        "\ngets choice.json for Supernet.convert, recipe.toml, front.json and front.svg.",
        '  qjax search models/stories260k --budget "6 bits" --recipes W4A16,W8A16 --text stories.txt\n'
        '  qjax search models/stories260k --budget "200 kB" --text stories.txt --by fisher\n'
        '  qjax search models/stories260k --budget "4.5 bits" --space 2-8/64 --generations 20 --text stories.txt\n'
        '  qjax search models/vit-tiny --budget "5 MB" --recipes W4A16,W8A8 --images imagenet-sample\n'
        '  qjax search models/llama --budget "9 ms" --device h100 --rows 1 --text text.txt --out found\n'
        "  qjax search models/resnet20 --supernet runs/job --budget '4 bits' --images cifar.npz --predictor 500\n"
        "  qjax search models/resnet20 --supernet runs/job --budget '4 bits,150 kB' --images cifar.npz\n"
        "  qjax quantize models/stories260k --recipe stories260k-search/recipe.toml",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="Hugging Face model folder with float weights")
    parser.add_argument(
        "--budget",
        required=True,
        metavar="B",
        help="'6 bits' (average of the weights, scales included), '10 MB' (all parameters), '2 ms', '5 mJ'",
    )
    _recipes_argument(parser, "W4A16,W8A16")
    parser.add_argument(
        "--space",
        metavar="BITS[/GROUP]",
        help="instead of --recipes: integer weights of each of these bits, as 2-8 or 3,4,6,8/64 (default group: 128)",
    )
    parser.add_argument(
        "--generations",
        type=_positive,
        metavar="N",
        help="go on with NSGA-II, which measures whole assignments instead of adding up single losses",
    )
    parser.add_argument(
        "--population", type=_positive, default=32, metavar="N", help="assignments in a generation (default: 32)"
    )
    parser.add_argument(
        "--by",
        choices=("kl", "output", "fisher"),
        default="kl",
        help="KL of the model's outputs; error of the layer's; second order of KL (default: kl)",
    )
    parser.add_argument(
        "--tie",
        action="append",
        default=[],
        metavar="S,S",
        help="layers whose names differ in these words share a format, as q_proj,k_proj,v_proj; may be repeated",
    )
    parser.add_argument(
        "--supernet", type=Path, metavar="DIR", help="search its subnets: a folder of a trained supernet"
    )
    parser.add_argument("--predictor", type=_some, metavar="N", help="run N subnets and predict the others")
    parser.add_argument(
        "--form",
        metavar="F",
        help="of all sites of a subnet: channel or tensor, sym or asym of weights, of activations, as channel/sym/asym",
    )
    parser.add_argument(
        "--group", type=_positive, metavar="N", help="of all sites of a subnet, if it has groups (default: its first)"
    )
    parser.add_argument(
        "--recalibrate",
        type=int,
        metavar="N",
        help="images to recalibrate batch norms of each subnet on, apart from those scored (default: 500; 0: none)",
    )
    parser.add_argument("--device", help="of budgets in time and energy: name or .toml file")
    parser.add_argument("--rows", type=_positive, metavar="N", help="tokens at a time there (default: as measured on)")
    parser.add_argument(
        "--samples",
        type=_positive,
        metavar="N",
        help="blocks or images (default: 16, or all where there are fewer)",
    )
    parser.set_defaults(usual_samples=16)
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of all draws (default: 0)")
    parser.add_argument("--out", type=Path, help="folder to write and to go on in (default: ./NAME-search)")
    _data(parser, "UTF-8 text to measure on", "images to measure on")


def _bench(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "bench",
        "time quantized products on the device at hand, or tune their kernels",
        "\nkernels: every lowering that can run here, with the share of what memory or arithmetic allow and the speed"
        "\nbeside bfloat16; no model is needed. tune: the schedules of kernels that have some, into a table by device."
        "\nOn a GPU times are the device's own; weights rotate through more memory than its cache.",
        "  qjax bench kernels\n"
        "  qjax bench kernels --shapes 4096x4096,28672x4096 --tokens 1,16,256 --formats 'int4 g128,int8 x int8 token'\n"
        "  qjax bench kernels --device h200 --json      the ceiling by the figures of `qjax advise --device list`\n"
        "  qjax bench tune --formats 'int4 g128' --seconds 300 --out tuned.json",
    )
    parser.add_argument("what", choices=("kernels", "tune"))
    parser.add_argument("--shapes", metavar="NxK,..", help="outputs x inputs of layers (default: by device)")
    parser.add_argument("--tokens", metavar="T,..", help="(default: by device)")
    parser.add_argument(
        "--formats",
        metavar="F,..",
        help="of weights, and of activations after an x: int4 g128, uint4 g64, int8, nf4, int8 x int8 token",
    )
    parser.add_argument("--dtype", default="bfloat16", metavar="T", help="of activations (default: bfloat16)")
    parser.add_argument("--trials", type=_positive, default=7, metavar="N", help="of which the median (default: 7)")
    parser.add_argument("--device", help="kernels: whose figures are the ceiling (default: measured here)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="tune: the table (default: that of qjax)")
    parser.add_argument("--seconds", type=float, metavar="S", help="tune: after which nothing further is begun")
    parser.add_argument("--experts", type=int, metavar="E", help="tune: ragged products of so many experts")
    parser.add_argument("--again", action="store_true", help="tune: measure also what the table has")


def _recipes_argument(parser: argparse.ArgumentParser, default: str) -> None:
    more = f"presets in any case (`qjax recipes` lists them), or .toml files (default: {default})"
    parser.add_argument("--recipes", nargs="+", default=[default], metavar="R,R", help=more)


def _data(parser: argparse.ArgumentParser, text: str, images: str) -> None:
    parser.add_argument("--text", type=Path, metavar="FILE", help=text)
    parser.add_argument("--images", type=Path, metavar="DIR", help=images)
    _cut(parser)


def _calibrating(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--calibration", type=Path, metavar="FILE|DIR", help=what)
    parser.add_argument(
        "--samples",
        type=_positive,
        metavar="N",
        help="blocks or images to calibrate on (default: 32, or all where there are fewer)",
    )
    parser.set_defaults(usual_samples=32)
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the draw of samples (default: 0)")


def _cut(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--protocol",
        type=str.upper,
        choices=("A", "B"),
        default="A",
        help="A: pieces between blank lines, each scored alone; B: the whole text in blocks (default: A)",
    )
    parser.add_argument(
        "--context", type=_positive, metavar="N", help="tokens per block (default: the model's, at most 2048)"
    )
    parser.add_argument("--limit", type=_positive, metavar="N", help="use only the first N blocks, images or pairs")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _some(text: str) -> int:
    value = int(text)
    if value < 10:
        raise argparse.ArgumentTypeError(f"{text} subnets are too few to fit a predictor; 10 or more")
    return value


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not zero or a positive number")
    return value
