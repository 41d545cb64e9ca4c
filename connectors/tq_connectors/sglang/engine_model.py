"""What SGLang knows of the model that a process runs. SGLang 0.5.17 to 0.5.23."""

import torch
import torch.distributed as dist
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.utils import get_pp_indices
from sglang.srt.mem_cache import utils as hashes
from sglang.srt.runtime_context import get_parallel, get_server_args

from tq_connectors.codec import CacheGeometry
from tq_connectors.sglang.page_hashes import check_page_hashes
from tq_connectors.sglang.page_setup import Place

_FLOAT8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def read_place(model: str, *, tp_rank: int, tp_size: int, pp_rank: int, pp_size: int) -> Place:
    """Whose cache this process holds, and which part of it.

    Args:
        model: Name of the model.
        tp_rank: Rank of the process among those that divide the KV heads.
        tp_size: How many these are.
        pp_rank: Its pipeline stage.
        pp_size: How many stages there are.

    Raises:
        ConfigError: The process serves LoRA adapters, which this release's hashes of pages leave out.
    """
    arguments = get_server_args()
    check_page_hashes(arguments, hashes)
    config = ModelConfig.from_server_args(arguments)
    num_layers = config.num_attention_layers
    geometry = CacheGeometry(
        num_layers=num_layers,
        num_kv_heads=config.get_total_num_kv_heads(),
        head_dim=config.head_dim,
        kv_dtype=str(config.dtype).removeprefix("torch."),
    )
    layers = range(*get_pp_indices(num_layers, pp_rank, pp_size))
    return Place(
        model=model,
        geometry=geometry,
        layers=layers,
        tp_rank=tp_rank,
        tp_size=tp_size,
        float8=_FLOAT8.get(arguments.kv_cache_dtype),
    )


def read_group() -> dist.ProcessGroup | None:
    """The ranks that divide the KV heads with this process, on their CPUs; None where it is alone."""
    return get_parallel().attn_tp_group.cpu_group if dist.is_initialized() else None
