"""The command line `peft-trex`: what an adapter is, and the work on one that needs no program."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .version import VERSION

# The exit codes; argparse ends with 2 for arguments that it does not take.
FAILED, INTERRUPTED = 1, 130
DATA = (
    'Data are a file of JSON rows, one a line: with "prompt" and, if there is one, "answer", both text or both lists '
    'of messages; or with "messages", a whole conversation.'
)


class Mistake(Exception):
    """What a user has to change; it is printed without a traceback."""


def info(arguments: argparse.Namespace) -> None:
    import json

    from .files import facts_of_files

    facts = facts_of_files(arguments.adapter)
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        width = max(map(len, facts))
        print("\n".join(f"{name:<{width}}  {value}" for name, value in facts.items()))


def fit_prior(arguments: argparse.Namespace) -> None:
    from peft import get_peft_model

    from .config import TRexConfig
    from .files import batches_of, load, load_base, save
    from .fit.fitting import initialize_trex_prior
    from .model import find_tuner
    from .notes import describe_trex

    if Path(arguments.model, "adapter_config.json").is_file():
        if arguments.form or arguments.clusters:
            raise Mistake(
                "--form and --clusters are for a new adapter, and MODEL is a folder with one; leave them out."
            )
        model, tokenizer = load(arguments.model, arguments)
        prior = find_tuner(model).prior_of("default")
        if prior is not None and prior.fitted and not arguments.again:
            raise Mistake(
                "The adapter's prior is fitted already, and what the adapter has learned goes by its clusters. "
                "--again fits it anew; train the adapter afterwards."
            )
    else:
        if arguments.out is None:
            raise Mistake("MODEL is a base model, so the new adapter needs a folder: --out FOLDER.")
        base, tokenizer = load_base(arguments.model, arguments)
        fields: dict[str, Any] = {"task_type": "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"}
        if arguments.clusters:
            fields["num_clusters"] = arguments.clusters
        make = TRexConfig if arguments.form == "paper" else TRexConfig.recommended
        model = get_peft_model(base, make(**fields))
    data = batches_of(arguments, tokenizer, model)
    report = initialize_trex_prior(
        model, data.batches, max_batches=arguments.max_batches, progress=not arguments.quiet, tokenizer=tokenizer
    )
    if data.tasks:
        describe_trex(model, tasks=data.tasks)
    print(
        f"prior: {report.prompts} prompts, {len(report.cluster_sizes)} clusters of {min(report.cluster_sizes)} to "
        f"{max(report.cluster_sizes)}, explained variance {report.explained_variance:.2f}"
    )
    save(model, arguments.out or arguments.model)


def report(arguments: argparse.Namespace) -> None:
    from .analysis.routing import routing_report
    from .files import batches_of, load

    model, tokenizer = load(arguments.adapter, arguments)
    data = batches_of(arguments, tokenizer, model, arguments.group_by)
    routing = routing_report(
        model,
        data.batches,
        group_by=arguments.group_by,
        max_batches=arguments.max_batches,
        progress=not arguments.quiet,
    )
    text = routing.to_markdown()
    if arguments.out is None:
        print(text)
    else:
        Path(arguments.out).write_text(text, encoding="utf-8")
        print(f"{routing}\nsaved {arguments.out}")
    if arguments.plot is not None:
        routing.plot(arguments.plot, detail=arguments.detail)
        print(f"saved {arguments.plot}")


def calibrate(arguments: argparse.Namespace) -> None:
    from .files import load, save

    model, tokenizer = load(arguments.adapter, arguments)
    _calibrate(model, tokenizer, arguments, arguments.groups or arguments.per_cluster)
    save(model, arguments.out or arguments.adapter)


def merge(arguments: argparse.Namespace) -> None:
    from .files import check_new, load

    check_new(arguments.out)
    model, tokenizer = load(arguments.adapter, arguments)
    if arguments.data is not None:
        _calibrate(model, tokenizer, arguments, False)
    merged = model.merge_and_unload(progressbar=not arguments.quiet)
    merged.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    print(f"saved {arguments.out}")


def export(arguments: argparse.Namespace) -> None:
    from .files import check_new, load
    from .lora.export import save_trex_as_lora

    check_new(arguments.out)
    if arguments.groups and (arguments.data is None or arguments.overall):
        raise ValueError("--groups is found among the prompts of --data, and is not for --overall.")
    model, tokenizer = load(arguments.adapter, arguments)
    if arguments.data is not None:
        _calibrate(model, tokenizer, arguments, arguments.groups or not arguments.overall)
    print(
        save_trex_as_lora(model, arguments.out, per_cluster=not arguments.overall, max_adapters=arguments.max_adapters)
    )
    print(f"saved {arguments.out}")


def _calibrate(model: Any, tokenizer: Any, arguments: argparse.Namespace, per_cluster: bool | int) -> None:
    from .deploy.calibration import calibrate_trex_merge
    from .files import batches_of

    data = batches_of(arguments, tokenizer, model)
    print(
        calibrate_trex_merge(
            model,
            data.batches,
            per_cluster=per_cluster,
            fit=arguments.fit,
            memory_gb=arguments.memory_gb,
            distill_steps=arguments.distill_steps or 0,
            max_batches=arguments.max_batches,
            progress=not arguments.quiet,
        )
    )


def make_parser() -> argparse.ArgumentParser:
    style: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(prog="peft-trex", description=__doc__, **style)
    parser.add_argument("--version", action="version", version=f"peft-trex {VERSION}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(run: Callable[[argparse.Namespace], None], text: str, example: str) -> argparse.ArgumentParser:
        name = run.__name__.replace("_", "-")
        about: dict[str, Any] = {
            "description": f"{text[0].upper()}{text[1:]}.",
            "epilog": f"example:\n  peft-trex {name} {example}",
        }
        part = commands.add_parser(name, help=text, **about, **style)
        part.set_defaults(run=run)
        return part

    part = command(
        info, "say what an adapter is: sizes, clusters, whether it is calibrated", "runs/quickstart/adapter"
    )
    _add_adapter(part)
    part.add_argument("--json", action="store_true", help="print JSON")

    part = command(
        fit_prior,
        "fit the semantic prior of an adapter, or of a new one on a base model",
        "HuggingFaceTB/SmolLM2-135M-Instruct --data train.jsonl --chat --out adapter",
    )
    part.add_argument("model", metavar="MODEL", help="folder of an adapter, or name or folder of a base model")
    part.add_argument("--out", metavar="FOLDER", help="where the adapter goes (default: where it came from)")
    part.add_argument("--form", choices=["recommended", "paper"], help="of a new adapter (default: recommended)")
    part.add_argument("--clusters", type=_count, metavar="K", help="number of clusters of a new adapter (default: 32)")
    part.add_argument("--again", action="store_true", help="fit a prior anew that is fitted already")
    _add_data(part, required=True)

    part = command(
        report,
        "say what the routers of an adapter do on some data",
        "adapter --data test.jsonl --chat --group-by task --plot routing.png",
    )
    _add_adapter(part)
    part.add_argument("--group-by", metavar="FIELD", help="the field of the rows to compare them by, such as task")
    part.add_argument("--out", metavar="FILE", help="write the report as Markdown (default: print it)")
    part.add_argument("--plot", metavar="FILE", help="draw it, as .png, .svg or .pdf; needs matplotlib")
    part.add_argument("--detail", action="store_true", help="draw all maps, not only the few that tell most")
    _add_data(part, required=True)

    part = command(
        calibrate,
        "find the static weights that miss least of an adapter, for merge and export, and keep them with it",
        "adapter --data train.jsonl --chat --per-cluster",
    )
    _add_adapter(part)
    part.add_argument("--per-cluster", action="store_true", help="for each cluster of prompts too, which export needs")
    _add_groups(part)
    part.add_argument("--out", metavar="FOLDER", help="where the adapter goes (default: where it came from)")
    _add_data(part, required=True, fit=True)

    part = command(
        merge,
        "merge an adapter into its base model, calibrated on --data first",
        "adapter --data train.jsonl --chat --out merged",
    )
    _add_adapter(part)
    part.add_argument("--out", metavar="FOLDER", required=True, help="a new folder for the merged model")
    _add_data(part, required=False, fit=True)

    part = command(
        export,
        "save an adapter as plain LoRA, one for each cluster of prompts, calibrated on --data first",
        "adapter --data train.jsonl --chat --out lora",
    )
    _add_adapter(part)
    part.add_argument("--out", metavar="FOLDER", required=True, help="a new folder for the LoRA adapters")
    part.add_argument(
        "--max-adapters", type=_count, metavar="N", help="join the clusters that are closest to N adapters"
    )
    _add_groups(part)
    part.add_argument("--overall", action="store_true", help="only one LoRA, for all prompts, and no router")
    _add_data(part, required=False, fit=True)
    commands.add_parser("serve-router", help="put an export behind one model's name, in front of a server")
    return parser


def _add_groups(part: argparse.ArgumentParser) -> None:
    said = "for N groups of prompts, found among those of --data, instead of the prior's clusters"
    part.add_argument("--groups", type=_count, metavar="N", help=said)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


_count.__name__ = "whole number"


def _add_adapter(part: argparse.ArgumentParser) -> None:
    part.add_argument("adapter", metavar="ADAPTER", help="folder of an adapter, or its name on a hub")


def _add_data(part: argparse.ArgumentParser, required: bool, fit: bool = False) -> None:
    """The options of commands that run the model over data."""
    if fit:
        part.add_argument(
            "--fit", choices=["auto", "core", "leading", "input"], default="auto", help="what the static weights read"
        )
        part.add_argument(
            "--memory-gb", type=float, default=2.0, metavar="GB", help="for the fit to the input (default: 2)"
        )
        part.add_argument(
            "--distill-steps", type=_count, metavar="N", help="then train them on the routed model's logits"
        )
    group = part.add_argument_group("data and model", DATA)
    group.add_argument("--data", metavar="FILE", required=required, help="rows like those that it was trained on")
    group.add_argument(
        "--chat", action="store_true", help="put prompts that are text into the tokenizer's chat template"
    )
    group.add_argument("--batch-size", type=_count, default=8, metavar="N", help="rows at once (default: 8)")
    group.add_argument("--max-batches", type=_count, metavar="N", help="stop after so many batches")
    group.add_argument(
        "--max-length", type=_count, default=2048, metavar="N", help="cut rows to N tokens (default: 2048)"
    )
    group.add_argument("--base", metavar="NAME", help="base model, where it is not the one that the adapter names")
    group.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    group.add_argument("--device", help="such as cpu or cuda (default: a GPU where there is one)")
    group.add_argument("--quiet", action="store_true", help="no progress bars")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code. A user's mistake is told in a line, and nothing else ends without a traceback."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["serve-router"]:
        # This command has a parser of its own, and needs packages that the others do not.
        from .serve_router.__main__ import main as serve

        serve(given[1:])
        return 0
    parsed = make_parser().parse_args(given)

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"peft-trex: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        try:
            parsed.run(parsed)
        except KeyboardInterrupt:
            print("peft-trex: interrupted", file=sys.stderr)
            return INTERRUPTED
        except (Mistake, OSError, ValueError, ImportError) as error:
            print(f"peft-trex: error: {error}", file=sys.stderr)
            return FAILED
    return 0


def run() -> NoReturn:
    """What the console script calls."""
    sys.exit(main())


if __name__ == "__main__":
    run()
