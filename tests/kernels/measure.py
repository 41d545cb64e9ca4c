"""Prints the measured tables of `kernels/README.md`: ``python -m tests.kernels.measure``, half a minute."""

import itertools
import math

import torch

from tq_kernels import Code, CodecSpec, KeyCenter, PageLayout
from tq_kernels.codebook import LEVELS, TARGETS, distortion, lloyd_max
from tq_kernels.prod import dequantize_mse, dequantize_prod, quantize_prod
from tq_kernels.reference import dequantize, quantize
from tq_kernels.spec import DEFAULT_ROTATION_SEED

from .hard_inputs import HARD_INPUTS, hard_input
from .prediction import norm_corrected_distortion

CODES = [Code.LM2, Code.LM3, Code.LM4, Code.E4M3_SCALED]


def main() -> None:
    """Print every table."""
    torch.set_num_threads(1)
    for table in (codebooks, bits, distortions, hard_inputs, centre, estimators):
        print(f"\n{table.__doc__}\n")
        for row in table(torch.Generator().manual_seed(2)):
            print("| " + " | ".join(row) + " |")


def codebooks(_: torch.Generator) -> list[list[str]]:
    """Codebooks: code, Gaussian distortion, of exact Lloyd-Max, excess, 4^b D."""
    rows = []
    for code in CODES[:3]:
        ours, exact = distortion(LEVELS[code], TARGETS[code]), distortion(lloyd_max(code.bits), 1.0)
        rows.append(
            [code.name, f"{ours:.6f}", f"{exact:.6f}", f"{ours / exact - 1:+.2%}", f"{4**code * ours:.3f}"]
        )
    return rows


def bits(_: torch.Generator) -> list[list[str]]:
    """Exact Lloyd-Max: bits, D, D(b) / D(b + 1), 4^b D."""
    measured = [distortion(lloyd_max(b), 1.0) for b in range(1, 8)]
    return [
        [str(b), f"{coarse:.6f}", f"{coarse / fine:.3f}", f"{4**b * coarse:.3f}"]
        for b, (coarse, fine) in enumerate(itertools.pairwise(measured), 1)
    ]


def distortions(generator: torch.Generator) -> list[list[str]]:
    """Gaussian vectors, no centre: code, then predicted / measured for d = 64, 80, 96, 128, 256."""
    rows = []
    for code in CODES:
        row = [code.name]
        for head_dim in (64, 80, 96, 128, 256):
            vectors = torch.randn(2_000_000 // head_dim // 16 * 16, 1, head_dim, generator=generator)
            measured = _error(vectors, code, DEFAULT_ROTATION_SEED)
            row.append(f"{norm_corrected_distortion(code, head_dim):.6f} / {measured:.6f}")
        rows.append(row)
    return rows


def hard_inputs(generator: torch.Generator) -> list[list[str]]:
    """Hard inputs over Gaussian: input, d, then shipped seed / mean of eight / worst of nine by code."""
    rows = []
    for kind, head_dim in itertools.product(HARD_INPUTS, (64, 128, 256)):
        vectors = hard_input(kind, head_dim, generator)[:, None]
        row = [kind, str(head_dim)]
        for code in CODES[:3]:
            ratios = [
                _error(vectors, code, seed) / norm_corrected_distortion(code, head_dim)
                for seed in (DEFAULT_ROTATION_SEED, *range(8))
            ]
            row.append(f"{ratios[0]:.2f} / {sum(ratios[1:]) / 8:.2f} / {max(ratios):.2f}")
        rows.append(row)
    return rows


def centre(generator: torch.Generator) -> list[list[str]]:
    """Offset of 50 times the noise, d = 128, P = 64: code, error over noise without and with a centre."""
    noise = torch.randn(4096, 1, 128, generator=generator)
    keys = noise + 50 * torch.randn(128, generator=generator)
    rows = []
    for code in CODES:
        row = [code.name]
        for center in KeyCenter:
            spec = CodecSpec(key=code, value=code, key_center=center)
            layout = PageLayout(spec=spec, head_dim=128, num_kv_heads=1, page_tokens=64)
            restored, _ = dequantize(quantize(keys, keys, layout, search=False), layout)
            row.append(f"{float(((restored - keys) ** 2).sum() / (noise**2).sum()):.4f}")
        rows.append(row)
    return rows


def estimators(generator: torch.Generator) -> list[list[str]]:
    """d = 128, cosine 0.3: bits, estimator, slope, d Var, d E err^2, |x_hat - x|^2."""
    cosine, groups = 0.3, 128
    rows = []
    for b in (2, 3, 4):
        errors: dict[str, list[torch.Tensor]] = {"mse": [], "norm-corrected": [], "prod": []}
        distances: dict[str, list[float]] = {name: [] for name in errors}
        for seed in range(groups):
            pair = torch.nn.functional.normalize(torch.randn(2, 256, 128, generator=generator), dim=-1)
            x, other = pair
            across = torch.nn.functional.normalize(other - (other * x).sum(-1, keepdim=True) * x, dim=-1)
            y = cosine * x + math.sqrt(1 - cosine**2) * across
            spec = CodecSpec(key=Code(b), value=Code(b), rotation_seed=seed)
            layout = PageLayout(spec=spec, head_dim=128, num_kv_heads=1, page_tokens=16)
            restored = {
                "mse": dequantize_mse(quantize_prod(x, bits=b + 1, seed=seed)),
                "norm-corrected": dequantize(quantize(x[:, None], x[:, None], layout, search=False), layout)[
                    0
                ][:, 0],
                "prod": dequantize_prod(quantize_prod(x, bits=b, seed=seed)),
            }
            for name, x_hat in restored.items():
                errors[name].append((y * x_hat).sum(-1) - cosine)
                distances[name].append(float(((x_hat - x) ** 2).sum(-1).mean()))
        for name, parts in errors.items():
            error = torch.cat(parts)
            rows.append(
                [
                    str(b),
                    name,
                    f"{1 + float(error.mean()) / cosine:.4f}",
                    f"{128 * float(error.var()):.4f}",
                    f"{128 * float((error**2).mean()):.4f}",
                    f"{sum(distances[name]) / groups:.4f}",
                ]
            )
    return rows


def _error(vectors: torch.Tensor, code: Code, seed: int) -> float:
    spec = CodecSpec(key=Code.BF16, value=code, rotation_seed=seed)
    layout = PageLayout(spec=spec, head_dim=vectors.shape[-1], num_kv_heads=1, page_tokens=16)
    _, restored = dequantize(quantize(vectors, vectors, layout, search=False), layout)
    return float(((restored - vectors) ** 2).sum() / (vectors**2).sum())


if __name__ == "__main__":
    main()
