"""Local checks of repository ids and license ids, before any request to the Hub."""

from __future__ import annotations

from kcv2diffusers.errors import Error, meant

# https://huggingface.co/docs/hub/repositories-licenses
_LICENSES = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m
bigscience-bloom-rail-1.0 bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0
c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0
cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m
deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2
fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research
intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 open-mdw openrail openrail++ osl-3.0 other pddl
postgresql unknown unlicense wtfpl zlib
"""
LICENSES = frozenset(_LICENSES.split())
_USUAL = ("creativeml-openrail-m", "openrail++", "apache-2.0", "mit", "other")  # listed in the error message


def check_names(repository: str, license: str | None = None) -> None:
    """Raise Error for a repository id or a license id that the Hub would reject."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        problem = " ".join(str(error).split())
        raise Error(f"{repository}: {problem}\nGive USER/NAME, or a name of your own account.") from None
    if license is not None and license not in LICENSES:
        raise Error(
            f"--license {license}: not a license that the Hub has an identifier for."
            f"{meant(license, LICENSES)}\n"
            f"Give one of https://huggingface.co/docs/hub/repositories-licenses: {', '.join(_USUAL)}, ..."
        )
