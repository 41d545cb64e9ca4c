"""`tq-store calibrate`: measure a model's codec state on texts of your own, for the store or for a file.

The first transformers replica that sees a page's worth of tokens does the same with its prompt; vLLM and
SGLang read a file. Run it before any replica of a store, and run replicas with the same model name, revision,
preset and page size.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tq_store.client import StoreClient
from tq_store.errors import BlockFormatError, ConfigError

if TYPE_CHECKING:
    from tq_connectors.codec_state import CodecState

EXIT_PRESENT = 1
DEFAULT_TOKENS = 2048
SMALLEST_TOKENS, LARGEST_TOKENS = 64, 16384
_EPILOG = """\
example:
  tq-store calibrate --model ./Qwen2.5-7B --model-name qwen2.5-7b --text notes.txt faq.txt
  tq-store calibrate --model ./Qwen2.5-7B --model-name qwen2.5-7b --text notes.txt --save qwen.state

With --save no store is asked; vLLM and SGLang take the file by TQ_CONNECTORS_STATE=qwen.state.

The store keeps the first state of a model that it is given. If it has one already, nothing changes and the
exit code is 1: purge the namespace that is printed, measure again, and restart the replicas.
"""


def add_command(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Make the command known to `tq-store`; an entry point of `tq_store.commands`."""
    text = "Measure a model's codec state on texts of your own, before any replica does it on its prompt."
    parser = add("calibrate", calibrate, text, _EPILOG)
    parser.add_argument("--model", required=True, metavar="NAME|FOLDER", help="as for the demo")
    parser.add_argument("--model-name", required=True, help="the name that replicas use")
    parser.add_argument("--revision", help="as replicas have it (default: a digest of the weights)")
    parser.add_argument("--text", required=True, nargs="+", type=Path, metavar="FILE", help="UTF-8")
    parser.add_argument(
        "--tokens", type=_tokens, default=DEFAULT_TOKENS, help="at most, in one pass (default: %(default)s)"
    )
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the state there, not to the store")
    parser.add_argument("--preset", default="tq4", help="or a table by layer (default: %(default)s)")
    parser.add_argument("--page-tokens", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float16", "float32"),
        help="the model's, as replicas run it (default: %(default)s)",
    )


def calibrate(options: argparse.Namespace, client: StoreClient) -> int:
    """Measure, offer, and say what became of it; the exit code is 1 if the store has another state.

    Raises:
        ConfigError: A model, preset, dtype or text that is not to be had, or nothing to measure.
        RpcError: The store cannot be reached.
    """
    try:
        measured, agreed, namespace = _measure_and_offer(options, client)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is missing; run: pip install 'tq-store[hf]'") from error
    except (ValueError, OSError, BlockFormatError) as error:
        raise ConfigError(str(error)) from error
    if options.save is not None:
        print(f"codec state {measured.digest[:16]}, in {options.save}: TQ_CONNECTORS_STATE={options.save}")
        return 0
    if agreed is None:
        raise ConfigError("the store did not keep the state: has it room for it?")
    if agreed.digest != measured.digest:
        print(f"the store has a codec state of this model already: {agreed.digest[:16]}, in {namespace}")
        return EXIT_PRESENT
    print(f"codec state {agreed.digest[:16]}, for {options.preset}")
    return 0


def _measure_and_offer(
    options: argparse.Namespace, client: StoreClient
) -> "tuple[CodecState, CodecState | None, str]":
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tq_connectors.codec_state import pack_state
    from tq_connectors.hf.connector import TQConnector, cache_geometry
    from tq_connectors.hf.models import fetch_model, weights_revision
    from tq_kernels import preset
    from tq_store.layer_table import LayerTable

    for name in LayerTable.parse(options.preset).presets:
        preset(name)  # before the model is fetched
    folder = fetch_model(options.model)
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in options.text)
    tokens: Sequence[int] = AutoTokenizer.from_pretrained(folder)(text)["input_ids"][: options.tokens]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype))
    with TQConnector(
        model,
        client,
        options.preset,
        model_name=options.model_name,
        revision=options.revision or weights_revision(folder),
        page_tokens=options.page_tokens,
    ) as connector:
        measured = connector.measure_state(tokens)
        if measured is None or connector.prefix_cache is None or not connector.is_balanced:
            raise ConfigError(f"{options.preset} on {len(tokens)} tokens has no codec state to measure")
        prefix_cache = connector.prefix_cache
        if options.save is not None:
            geometry = cache_geometry(model.config, model.dtype)
            options.save.write_bytes(pack_state(measured, prefix_cache.namespace, geometry))
            return measured, None, ""
        return measured, prefix_cache.fetch_or_offer(measured), prefix_cache.namespace.digest().hex()


def _tokens(text: str) -> int:
    """Bounded, as all are attended to in one pass."""
    number = int(text)
    if not SMALLEST_TOKENS <= number <= LARGEST_TOKENS:
        raise argparse.ArgumentTypeError(f"must be from {SMALLEST_TOKENS} to {LARGEST_TOKENS}")
    return number
