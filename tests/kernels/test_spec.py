"""Presets are what they say, frozen, and told apart by fingerprints that never change."""

import dataclasses
import subprocess
import sys

import pytest

from tq_kernels import PRESETS, Code, CodecSpec, KeyCenter, Rotation, preset, spec

FINGERPRINTS = {
    "tq4": "683e84422ccff47dd1ee4e539fb2b4ce1ade31717de4a2057ec26856e94a6b4c",
    "tq3": "50e21f01fc085fe4dffda24952e924251eae4aad1690643261cefd5f66ab2e0c",
    "tq2": "c050103e8bcf7ab89258bbf5a8520b4876716b60275a7280d67c16ee26b5e5c9",
    "k8v4": "3f176ab7ac063c26de675e72cb73112f30f62e7de18a5b9e720871116396756e",
    "k4v3": "685cef20869fb64d4a2ef75da1faf001249f5534161910695593d77ba085fd1d",
    "k4v2": "ee23d61a3a29bc1815cf3b29309ad5865227dd2e53f0970f8877881221f0bf0f",
    "k3v4": "c08b90f444ac21882ae387ca16c85547284c7d1fb5cbbfcb718f1ffe5e9c2f6d",
    "k3v2": "c21c5f7d0e8b45522f93fa0683daeffa3ccbb2597a562df53a0bb32f633440fe",
    "fp8": "57c33aeb79eede163fe2190751d7c23b5d1d7ce3e470ddfea3852ed032203350",
    "raw": "613bf80aafe5bf4a95ee39e52ef16905ecc4c9a15fe276564a5b504d0eaee1cd",
}
"""A released fingerprint is part of keys in people's stores: a line here is never changed."""

TQ4 = CodecSpec(key=Code.LM4, value=Code.LM4, key_center=KeyCenter.PAGE)


def test_presets_name_their_codes() -> None:
    bits = {name: (codec.key.bits, codec.value.bits) for name, codec in PRESETS.items()}

    assert bits == {
        "tq4": (4, 4),
        "tq3": (3, 3),
        "tq2": (2, 2),
        "k8v4": (8, 4),
        "k4v3": (4, 3),
        "k4v2": (4, 2),
        "k3v4": (3, 4),
        "k3v2": (3, 2),
        "fp8": (8, 8),
        "raw": (16, 16),
    }


def test_every_rotated_preset_takes_the_page_centre_out_of_keys() -> None:
    for name, codec in PRESETS.items():
        rotated = name not in ("fp8", "raw")
        assert codec.key_center is (KeyCenter.PAGE if rotated else KeyCenter.NONE)
        assert codec.rotation is (Rotation.HADAMARD2 if rotated else Rotation.NONE)


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_fingerprint_is_the_released_one(name: str) -> None:
    assert preset(name).fingerprint.hex() == FINGERPRINTS[name]
    assert set(FINGERPRINTS) == set(PRESETS)


def test_all_fields_and_only_they_change_the_fingerprint() -> None:
    changes = {"key": Code.LM3, "value": Code.LM3, "key_center": KeyCenter.NONE, "rotation_seed": 1}
    assert set(changes) == {field.name for field in dataclasses.fields(CodecSpec)}
    changed = [dataclasses.replace(TQ4, **{name: value}) for name, value in changes.items()]

    assert len({TQ4.fingerprint, *(codec.fingerprint for codec in changed)}) == len(changes) + 1
    assert dataclasses.replace(TQ4).fingerprint == TQ4.fingerprint


def test_every_pair_of_codes_has_its_own_fingerprint() -> None:
    pairs = [CodecSpec(key=key, value=value) for key in Code for value in Code]

    assert len({codec.fingerprint for codec in pairs}) == len(Code) ** 2


def test_seed_counts_only_where_something_is_rotated() -> None:
    assert dataclasses.replace(PRESETS["raw"], rotation_seed=1).fingerprint == PRESETS["raw"].fingerprint
    for pair in ((Code.LM4, Code.BF16), (Code.BF16, Code.LM4)):
        codec = CodecSpec(key=pair[0], value=pair[1])
        assert dataclasses.replace(codec, rotation_seed=1).fingerprint != codec.fingerprint


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LEVELS", {**spec.LEVELS, 4: (2.25, 6.5, 11.0, 16.0, 22.0, 28.0, 36.0, 44.0)}),
        ("TARGETS", {**spec.TARGETS, 4: 17.5}),
        ("CODEC_ID", 2),
        ("PACKING_ID", 2),
    ],
)
def test_another_codebook_codec_or_packing_is_another_identity(
    name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spec, name, value)

    assert TQ4.fingerprint.hex() != FINGERPRINTS["tq4"]


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TQ4.key = Code.LM2  # type: ignore[misc]
    assert hash(TQ4) == hash(PRESETS["tq4"])
    assert PRESETS["tq4"] == TQ4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"key": 4, "value": Code.LM4}, "members of Code, not 4 and"),
        ({"key": Code.LM4, "value": "LM4"}, "members of Code, not .* and 'LM4'"),
        ({"key": Code.LM4, "value": Code.LM4, "key_center": 1}, "member of KeyCenter, not 1"),
        (
            {"key": Code.BF16, "value": Code.LM4, "key_center": KeyCenter.PAGE},
            "key_center=PAGE needs a rotated key code, BF16 is not",
        ),
        (
            {"key": Code.LM4, "value": Code.LM4, "rotation_seed": -1},
            r"rotation_seed must be an integer in \[0, 2\*\*64\)",
        ),
        ({"key": Code.LM4, "value": Code.LM4, "rotation_seed": 1 << 64}, "rotation_seed must be an integer"),
        ({"key": Code.LM4, "value": Code.LM4, "rotation_seed": 1.0}, "rotation_seed must be an integer"),
    ],
)
def test_meaningless_specs_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CodecSpec(**arguments)  # type: ignore[arg-type]


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown preset 'tq5'; choose one of tq4, tq3, .*, fp8, raw"):
        preset("tq5")


def test_sizes_can_be_computed_without_torch() -> None:
    program = (
        "import sys, tq_kernels as k\n"
        "k.PageLayout(spec=k.preset('tq4'), head_dim=128, num_kv_heads=8).page_bytes\n"
        "print(sorted({'torch', 'numpy', 'numba', 'triton'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"
