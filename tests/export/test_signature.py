"""signature: with a public key only a folder that its owner signed is opened, and never before that is known."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from clora.errors import InputError
from clora.export import artefact as opening
from clora.export.artefact import open_artefact
from clora.export.manifest import MANIFEST, check_folder, read_manifest, write_manifest
from clora.export.signature import SIGNATURE, check_signature, private_key, public_key, sign
from clora.jobs.export import ExportRequest, export
from clora.jobs.verify import verify_artefact
from tests.export.test_manifest import edit_manifest, make

serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")


def write_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """A pair of keys in the PEM that openssl writes."""
    key = ed25519.Ed25519PrivateKey.generate()
    pem, raw = serialization.Encoding.PEM, serialization.NoEncryption()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, raw))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path, "own")


@pytest.fixture
def signed(tmp_path: Path, keys: tuple[Path, Path]) -> Path:
    folder = make(tmp_path / "artefact")
    write_manifest(folder, read_manifest(folder), keys[0])
    return folder


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("something was loaded")

    for name in ("open_aoti", "open_onnx", "open_engine", "load_backbone"):
        monkeypatch.setattr(opening, name, load)


def sign_with_another(folder: Path) -> None:
    private, _ = write_keys(folder.parent, "other")
    write_manifest(folder, read_manifest(folder), private)


def link_signature(folder: Path) -> None:
    shutil.move(folder / SIGNATURE, folder.parent / "sig")
    (folder / SIGNATURE).symlink_to(folder.parent / "sig")


def from_another_artefact(folder: Path) -> None:
    other = make(folder.parent / "second", base="other")
    write_manifest(other, read_manifest(other), folder.parent / "own.pem")
    shutil.copy(other / SIGNATURE, folder / SIGNATURE)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "unsigned": (lambda f: (f / SIGNATURE).unlink(), "is not signed"),
    "signed by another": (sign_with_another, "was not signed with the key"),
    "of another artefact": (from_another_artefact, "was not signed with the key"),
    "manifest edited": (lambda f: edit_manifest(f, lambda v: v.update(base="x")), "was not signed with the key"),
    "manifest with a space": (
        lambda f: (f / MANIFEST).write_text((f / MANIFEST).read_text() + " "), "was not signed with the key",
    ),
    "cut off": (lambda f: (f / SIGNATURE).write_text("QUJD"), "was not signed with the key"),
    "no base64": (lambda f: (f / SIGNATURE).write_bytes(b"\xff" * 64), "was not signed with the key"),
    "empty": (lambda f: (f / SIGNATURE).write_text(""), "was not signed with the key"),
    "huge": (lambda f: (f / SIGNATURE).write_bytes(b"A" * 5000), "it is too large"),
    "a link": (link_signature, "is not signed"),
    "a folder": (lambda f: ((f / SIGNATURE).unlink(), (f / SIGNATURE).mkdir()), "is not signed"),
    "file changed": (lambda f: (f / "model.pt2").write_bytes(b"native c0de" * 100), "is not what was exported"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_open_artefact_refuses_what_the_key_did_not_sign(
    damage: str, signed: Path, keys: tuple[Path, Path], never_loaded: None
) -> None:
    assert check_folder(signed, keys[1]) == check_folder(signed)
    hurt, message = DAMAGES[damage]
    hurt(signed)
    for refuse in (open_artefact, verify_artefact):
        with pytest.raises(InputError, match=message) as error:
            refuse(signed, key=keys[1])
        assert "\n" not in str(error.value)


def test_read_manifest_parses_nothing_that_is_not_signed(signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / MANIFEST).write_text("[" * 100)
    with pytest.raises(InputError, match="was not signed"):
        read_manifest(signed, keys[1])
    with pytest.raises(InputError, match="is no JSON"):
        read_manifest(signed)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_keys_are_those_that_openssl_writes_and_checks(tmp_path: Path) -> None:
    """The two commands of docs/EXPORT.md; and openssl itself finds our signature right."""
    private, public = tmp_path / "key.pem", tmp_path / "public.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True, capture_output=True)
    sign(b"content", private, tmp_path)
    check_signature(b"content", public, tmp_path)
    import base64

    (tmp_path / "raw").write_bytes(base64.b64decode((tmp_path / SIGNATURE).read_text()))
    (tmp_path / "content").write_bytes(b"content")
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin", "-in", tmp_path / "content"]
    assert subprocess.run([*command, "-sigfile", tmp_path / "raw"], capture_output=True).returncode == 0


def test_keys_of_other_kinds_are_refused_in_a_sentence(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec

    other = ec.generate_private_key(ec.SECP256R1())
    pem, raw = serialization.Encoding.PEM, serialization.NoEncryption()
    curve, curve_pub, locked = tmp_path / "curve.pem", tmp_path / "curve.pub", tmp_path / "locked.pem"
    curve.write_bytes(other.private_bytes(pem, serialization.PrivateFormat.PKCS8, raw))
    curve_pub.write_bytes(other.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    password = serialization.BestAvailableEncryption(b"x")
    locked.write_bytes(
        ed25519.Ed25519PrivateKey.generate().private_bytes(pem, serialization.PrivateFormat.PKCS8, password)
    )
    for load, path, message in (
        (private_key, curve, "is of another kind; make one with openssl genpkey"),
        (private_key, locked, "is no private key in PEM without a password"),
        (private_key, keys[1], "is no private key in PEM"),
        (private_key, tmp_path / "none", "cannot be read .No such file"),
        (public_key, curve_pub, "is of another kind"),
        (public_key, keys[0], "is no public key in PEM; write it with openssl pkey"),
    ):
        with pytest.raises(InputError, match=message) as error:
            load(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_export_signs_with_a_key_that_is_checked_before_weights_are_read(
    one_block: tuple[Path, Path], tmp_path: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, lora = one_block
    request = ExportRequest(tmp_path / "made", "merged", str(base), lora, num_edits=1, key=keys[0])
    export(request)
    assert open_artefact(request.output, key=keys[1]).manifest.format == "merged"
    assert (request.output / SIGNATURE).is_file() and SIGNATURE not in read_manifest(request.output).files
    monkeypatch.setattr("clora.jobs.export.build", None)
    with pytest.raises(InputError, match="is no private key in PEM"):
        export(ExportRequest(tmp_path / "again", "merged", str(base), lora, key=keys[1]))
