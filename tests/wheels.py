"""Wheels that carry a model, for a made-up package index."""

import hashlib
import zipfile

from nybble.hub import KnownModel, PackagePart


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def write_wheel(folder, package, members, version="1.0"):
    """Write a wheel that pip accepts, with `members` as (name, data) in it."""
    module = package.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    path = folder / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        )
        archive.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


def model_of(parts, name="tiny-test-model"):
    """Describe a model whose parts are (package, member, data)."""
    whole = b"".join(data for _, _, data in parts)
    return KnownModel(
        name=name,
        title="Tiny",
        licence="Apache-2.0",
        hub="nobody/nothing",
        file="tiny.gguf",
        size=len(whole),
        sha256=sha256(whole),
        parts=tuple(
            PackagePart(package, "1.0", member, len(data), sha256(data), len(data))
            for package, member, data in parts
        ),
    )
