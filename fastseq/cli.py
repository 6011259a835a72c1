"""The command line: ``fastseq demo | train | translate | doctor | bench``."""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fastseq.training.settings import MODELS, Settings

if TYPE_CHECKING:
    from fastseq.training.checkpoint import Epoch

# torch, matplotlib and the rest are imported inside the commands: help has to come at once.

app = typer.Typer(
    name="fastseq",
    help="Recurrent encoder-decoders in PyTorch, with kernels that make them fast on the CPU.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Text, Model, Training = (
    functools.partial(typer.Option, rich_help_panel=panel)
    for panel in ("Text", "Model", "Training")
)
Device = Annotated[
    str,
    typer.Option(
        help="Where to compute: cpu, cuda, cuda:1 ..., or auto, which is a GPU if there is one."
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="CPU threads.", show_default="as torch chooses, one a core"),
]


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the errors a user can cause into one line on standard error and exit code 1.

    FASTSEQ_DEBUG=1 lets them through with their traceback.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except BrokenPipeError:
            raise
        except (OSError, RuntimeError, TypeError, ValueError, MemoryError) as error:
            # typer's own way out is a RuntimeError.
            if isinstance(error, typer.Exit) or os.environ.get("FASTSEQ_DEBUG") == "1":
                raise
            fail(command.__name__, describe(error), 1)
        except KeyboardInterrupt as interruption:
            # 128 + SIGINT, as shells report it.
            fail(command.__name__, str(interruption) or "interrupted", 130)

    return run


def describe(error: Exception) -> str:
    """The first line of an error, without the name of the function that raised it."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0]
    where, colon, rest = line.partition(": ")
    return rest if colon and where.startswith("fastseq.") else line


def fail(command: str, message: str, code: int) -> None:
    """Print one line on standard error and leave."""
    typer.echo(f"fastseq {command}: {message}", err=True)
    raise typer.Exit(code)


def print_version(wanted: bool) -> None:
    """Print the version and leave, if asked to."""
    if wanted:
        import fastseq

        typer.echo(fastseq.__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, help="Show the version.")
    ] = False,
) -> None:
    """Options that need no command."""


@app.command()
@reports_errors
def demo(
    steps: Annotated[int, typer.Option(min=1, help="Training steps of 64 sequences.")] = 2000,
    model: Annotated[
        Literal["attention", "plain"],
        typer.Option(help="Decoder with attention, or one that has only the encoder's last state."),
    ] = "attention",
    seed: Annotated[int, typer.Option(min=0, help="Of weights, data and teacher forcing.")] = 0,
    out: Annotated[Path, typer.Option(help="Directory for the pictures.")] = Path("demo-output"),
    device: Device = "auto",
) -> None:
    """Train a digit-copying model twice, plain and fast, and compare.

    Both start from the same weights and see the same data. Shows the losses, the share of fresh
    sequences copied without error and the seconds each took, and draws the loss curves and what
    the attention looked at.

    Example: `fastseq demo --steps 500`
    """
    from fastseq.demo import run
    from fastseq.training.model import resolve_device

    run(steps=steps, seed=seed, out=out, device=str(resolve_device(device)), model=model)


@app.command()
@reports_errors
def train(
    context: typer.Context,
    train_source: Annotated[
        str | None, Text(help="Text to learn from, one sentence a line; plain or .gz.")
    ] = None,
    train_target: Annotated[str | None, Text(help="Its translation, line for line.")] = None,
    valid_source: Annotated[
        str | None, Text(help="Text to measure progress on, not learnt from.")
    ] = None,
    valid_target: Annotated[str | None, Text(help="Its translation, line for line.")] = None,
    min_frequency: Annotated[
        int, Text(min=1, help="Words that occur less often than this count as unknown.")
    ] = Settings.min_frequency,
    subwords: Annotated[
        int,
        Text(
            min=0,
            help="Cut words into frequent pieces, learning this many joins from each side; 0: "
            "whole words. 8000 is usual; losses are then a piece and not a word.",
        ),
    ] = Settings.subwords,
    max_length: Annotated[
        int, Text(min=1, help="Leave out training pairs with a side of more words than this.")
    ] = Settings.max_length,
    limit: Annotated[
        int | None,
        Text(min=1, help="Use only the first lines of each file, to try things out; say 1000."),
    ] = None,
    model: Annotated[
        Literal["attention", "bahdanau"],
        Model(
            help="attention: an LSTM that reads the source forwards and one that writes. bahdanau: "
            "the published translation model, of GRUs, reading in both directions."
        ),
    ] = Settings.model,
    embedding: Annotated[
        int, Model(min=1, help="Numbers that stand for a word.")
    ] = Settings.embedding,
    hidden: Annotated[
        int,
        Model(
            min=1,
            help="Width of the recurrent layers and of the attention.",
            show_default=f"{Settings.hidden}; of bahdanau {MODELS['bahdanau']['hidden']}",
        ),
    ] = Settings.hidden,
    dropout: Annotated[
        float,
        Model(
            min=0,
            max=1,
            help="Of bahdanau: part of the embeddings left out at random while training.",
            show_default=str(MODELS["bahdanau"]["dropout"]),
        ),
    ] = Settings.dropout,
    output_dropout: Annotated[
        float,
        Model(min=0, max=1, help="Of bahdanau: the same of what the output layer reads."),
    ] = Settings.output_dropout,
    reference: Annotated[
        bool, Model("--reference", help="Train the plain PyTorch modules instead, to compare.")
    ] = False,
    epochs: Annotated[
        int, Training(min=1, help="Passes over the data, resumed ones counted.")
    ] = Settings.epochs,
    batch_size: Annotated[
        int, Training(min=1, help="Sentence pairs a step.")
    ] = Settings.batch_size,
    learning_rate: Annotated[
        float, Training(min=0, help="Step size of Adam.")
    ] = Settings.learning_rate,
    decay: Annotated[
        float,
        Training(
            min=0,
            max=1,
            help="Multiplies the learning rate after each epoch that did not lower the validation "
            "loss; 1: it stays, 0.5 is usual for the best result.",
        ),
    ] = Settings.decay,
    label_smoothing: Annotated[
        float,
        Training(
            min=0,
            max=1,
            help="Part of each target spread evenly over all words, against overconfidence; 0.1 is "
            "usual for the best result. The training loss then never comes near 0.",
        ),
    ] = Settings.label_smoothing,
    precision: Annotated[
        Literal["float32", "high", "bfloat16"],
        Training(
            help="high: torch's switch of that name, faster products of float32 where there are "
            "such; bfloat16: torch's autocast. Weights stay float32."
        ),
    ] = Settings.precision,
    clip: Annotated[
        float, Training(min=0, help="Largest norm of a step's gradients; 0: no limit.")
    ] = Settings.clip,
    teacher_forcing: Annotated[
        float,
        Training(
            min=0,
            max=1,
            help="How often the decoder is given the right last word instead of its own: 1 is "
            "fastest and usual for translation, 0.5 trains it on its own mistakes too.",
        ),
    ] = Settings.teacher_forcing,
    seed: Annotated[
        int, Training(min=0, max=2**32 - 1, help="Of weights, order and teacher forcing.")
    ] = Settings.seed,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory for last.pt, best.pt and history.csv.",
            show_default="with --resume, the directory of the checkpoint",
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Go on from this checkpoint with its settings and files. Give --epochs to raise "
            "their number, or file names if the files have moved."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a run in --out.")] = False,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Train a translation model with attention on parallel text.

    After every epoch the model is measured on the validation text and saved; training stopped with
    Ctrl-C goes on from there, to the same result, with --resume. The loss is in nats a token, the
    perplexity its exponential. Under torchrun the processes share each batch between them.

    Example: `fastseq train --train-source train.de.gz --train-target train.en.gz
    --valid-source val.de.gz --valid-target val.en.gz --out runs/de-en`

    Then: `fastseq train --resume runs/de-en/last.pt --epochs 20`

    The published model: the same with `--model bahdanau`

    In two processes: `torchrun --nproc-per-node 2 -m fastseq.cli train ...`
    """
    given = {
        name: value
        for name, value in context.params.items()
        if context.get_parameter_source(name).name == "COMMANDLINE"
    }
    chosen = {f.name: given[f.name] for f in fields(Settings) if f.name in given}
    if resume is None:
        required = ("train_source", "train_target", "valid_source", "valid_target", "out")
        missing = [option(name) for name in required if name not in given]
        if missing:
            raise typer.BadParameter(f"without --resume, {', '.join(missing)} must be given")

    import torch

    from fastseq.training import checkpoint as checkpoints
    from fastseq.training import parallel, run

    if threads:
        torch.set_num_threads(threads)
    if resume is None:
        saved, settings, continues = None, Settings(**(MODELS[model] | chosen)), False
    else:
        saved = checkpoints.load(resume)
        settings = resumed(saved.settings, chosen)
        out = out or resume.parent
        continues = out.resolve() == resume.parent.resolve()
    with parallel.join() as team:
        history = run.train(
            settings,
            out,
            resume=saved,
            reference=reference,
            device=device,
            force=force or continues,
            say=typer.echo if team.rank == 0 else lambda line: None,
            team=team,
        )
    if team.rank == 0:
        show_history(history)


def option(name: str) -> str:
    """The option that sets a parameter."""
    return "--" + name.replace("_", "-")


def resumed(saved: Settings, given: dict[str, Any]) -> Settings:
    """A checkpoint's settings, with what may change when it is resumed.

    Raises:
        ValueError: an option was given that contradicts the checkpoint.
    """
    movable = {"epochs", "precision"}
    movable |= {"train_source", "train_target", "valid_source", "valid_target"}
    for name, value in given.items():
        if name not in movable and value != getattr(saved, name):
            raise ValueError(
                f"expected the checkpoint's {option(name)} {getattr(saved, name)}, got {value}; "
                "leave it out, or start a new run without --resume"
            )
    return replace(saved, **given)


def show_history(history: list[Epoch]) -> None:
    """Print a table of all epochs."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Losses in nats a token, seconds of training")
    for name in ("epoch", "train loss", "valid loss", "perplexity", "seconds", "tokens/s"):
        table.add_column(name, justify="right")
    formats = ("d", ".4f", ".4f", ".2f", ".1f", ".0f")
    for epoch in history:
        table.add_row(*map(format, epoch, formats))
    Console().print(table)


@app.command()
@reports_errors
def translate(
    checkpoint: Annotated[Path, typer.Argument(help="last.pt or best.pt of fastseq train.")],
    source: Annotated[
        str,
        typer.Option(help="Text to translate, one sentence a line; plain, .gz, or - for stdin."),
    ],
    reference_text: Annotated[
        Path | None,
        typer.Option(help="The right translation, line for line: print BLEU and perplexity."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="File for the translation.", show_default="standard output"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sentences decoded together.")] = 64,
    max_length: Annotated[
        int, typer.Option(min=1, help="Cut translations off after this many words.")
    ] = 100,
    beam: Annotated[
        int,
        typer.Option(
            min=1, help="Hypotheses kept at each word; 1 always takes the most likely next word."
        ),
    ] = 1,
    length_penalty: Annotated[
        float,
        typer.Option(min=0, help="With --beam: the higher, the longer translations may be."),
    ] = 1.0,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Translate text with a trained model.

    The translation is in lower case, line for line. BLEU is sacrebleu's, without regard to case,
    with its signature. The perplexity is that of the right translation, a token.

    Example: `fastseq translate runs/de-en/best.pt --source test.de.gz
    --reference-text test.en.gz --beam 5 --output test.out`
    """
    import torch

    from fastseq._files import atomic_write, check_writable
    from fastseq.training import checkpoint as checkpoints
    from fastseq.training.data import check_line_counts, decode_lines, read_lines
    from fastseq.training.model import resolve_device
    from fastseq.training.translate import bleu, perplexities
    from fastseq.training.translate import translate as translate_lines

    if threads:
        torch.set_num_threads(threads)
    where = resolve_device(device)
    if output:
        check_writable(output.parent)
        if output.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(output))
        for path in (checkpoint, source, reference_text):
            if path and output.exists() and Path(path).exists() and output.samefile(path):
                raise ValueError(f"expected --output other than the input, got {output}")
    saved = checkpoints.load(checkpoint)
    if source == "-":
        lines = list(decode_lines(sys.stdin.buffer, "standard input"))
    else:
        lines = read_lines(source)
    references = read_lines(reference_text) if reference_text else None
    if references is not None:
        check_line_counts({source: lines, str(reference_text): references})
    translations = translate_lines(
        saved, lines, batch_size, max_length, where, beam=beam, length_penalty=length_penalty
    )
    text = "".join(f"{line}\n" for line in translations)
    if output:
        with atomic_write(output) as temporary:
            temporary.write_text(text, encoding="utf-8")
    else:
        sys.stdout.buffer.write(text.encode("utf-8"))
        sys.stdout.buffer.flush()
    if references is not None:
        given, own = perplexities(saved, lines, references, batch_size, where)
        # Standard output may be the translation itself.
        typer.echo(bleu(translations, references), err=output is None)
        typer.echo(
            f"perplexity {given:.2f} given the right words before each, {own:.2f} given its own",
            err=output is None,
        )


@app.command()
@reports_errors
def doctor() -> None:
    """Show what is installed, which kernels run here, and why not others.

    The exit code is 1 if the native library does not load.
    """
    from rich.console import Console
    from rich.table import Table

    from fastseq.doctor import report

    rows, healthy = report()
    table = Table(show_header=False)
    for name, value in rows:
        table.add_row(name, value)
    Console().print(table, markup=False)
    if not healthy:
        raise typer.Exit(1)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@reports_errors
def bench(context: typer.Context) -> None:
    """Time the LSTM against torch's, with a correctness check first.

    Needs the source tree: benchmarks are not installed. All arguments go to
    benchmarks/bench_recurrent.py; `fastseq bench -- --help` lists them.

    Example: `fastseq bench --quick --rows 1,3`
    """
    root = Path(__file__).resolve().parent.parent
    script = root / "benchmarks" / "bench_recurrent.py"
    if not script.is_file():
        raise FileNotFoundError(
            f"expected the source tree of fastseq, got no {script}; "
            "run this in a checkout installed with pip install -e ."
        )
    sys.path.insert(0, str(root))
    raise typer.Exit(import_module("benchmarks.bench_recurrent").main(context.args))


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
