#!/usr/bin/env bash
# Collects what benchmarks/on_gpu.sh needs beside torch, Triton, transformers, pandas and pyarrow, for a machine without a network.
# The last two are not in it because pyarrow alone would fill it.
#
#   bash benchmarks/gpu_bundle.sh FOLDER [VERSION]       wheels of Python VERSION (3.12) on Linux, x86-64, at most 60 MB
#
# They are those of verl's engine, without vLLM, and of the tests, and of Ray what can be imported: not its servers and Java,
# because nothing starts a cluster. On the other machine: BUNDLE=FOLDER bash benchmarks/on_gpu.sh
set -euo pipefail

FOLDER=${1:?gpu_bundle.sh: name the folder to write}
VERSION=${2:-3.12}
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}  # with torch: flash-attn's sources ask for it
LIMIT_MB=60
PACKAGES=(
    verl tensordict pyvers codetiming datasets dill multiprocess hydra-core omegaconf ray torchdata
    TransferQueue wrapt colorful msgspec orjson pyzmq jsonschema jsonschema-specifications referencing rpds-py pydantic pydantic-core
    annotated-types typing-inspection jmespath fastapi starlette python-multipart email-validator dnspython google-auth google-api-core
    googleapis-common-protos proto-plus pyasn1 pyasn1-modules cachetools pydantic-extra-types uvicorn watchfiles sniffio
    opencensus opencensus-context smart-open aiohttp-cors
    click rich pygments markdown-it-py mdurl pytest pluggy iniconfig hypothesis sortedcontainers
    cloudpickle msgpack protobuf requests urllib3 charset-normalizer attrs xxhash pillow peft accelerate
)
SOURCE_ONLY=(antlr4-python3-runtime)  # on an index without a wheel; one is built, of Python alone
FLASH_ATTN=flash-attn==2.8.3  # of its sources the cross entropy in Triton, which verl takes log-probs with on a GPU
PLATFORMS=(manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 manylinux1_x86_64)

mkdir -p "$FOLDER"
platforms=()
for platform in "${PLATFORMS[@]}"; do platforms+=(--platform "$platform"); done
"$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$VERSION" --implementation cp \
    "${platforms[@]}" --constraint "$ROOT/constraints.txt" --dest "$FOLDER" "${PACKAGES[@]}"

"$PYTHON" -m pip wheel --quiet --no-deps --constraint "$ROOT/constraints.txt" --wheel-dir "$FOLDER" \
    "${SOURCE_ONLY[@]}"

sources=$(mktemp -d)
trap 'rm -rf "$sources"' EXIT
FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE "$PYTHON" -m pip download --quiet --no-deps --no-build-isolation --no-binary=flash-attn \
    --dest "$sources" "$FLASH_ATTN"

"$PYTHON" - "$FOLDER" "$sources" <<'PROGRAM'
import sys
import tarfile
import zipfile
from pathlib import Path

(archive,) = Path(sys.argv[2]).glob("flash_attn-*.tar.gz")
MODULE = "flash_attn/ops/triton/cross_entropy.py"
with tarfile.open(archive) as sources, zipfile.ZipFile(Path(sys.argv[1], f"{archive.name[:-7]}-py3-none-any.whl"), "w") as wheel:
    for folder in Path(MODULE).parents[:-1]:
        wheel.writestr(f"{folder}/__init__.py", "")  # theirs import what was compiled
    wheel.writestr(MODULE, sources.extractfile(f"{archive.name[:-7]}/{MODULE}").read())

DROPPED = ("ray/jars/", "ray/core/src/", "ray/rllib/", "ray/dashboard/client/")
for wheel in Path(sys.argv[1]).glob("ray-*.whl"):
    slim = wheel.with_suffix(".slim")
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(slim, "w", zipfile.ZIP_DEFLATED) as kept:
        for entry in whole.infolist():
            if not entry.filename.startswith(DROPPED):
                kept.writestr(entry, whole.read(entry))
    slim.replace(wheel)
PROGRAM

size=$(du --summarize --block-size=1000000 "$FOLDER" | cut -f1)
echo "gpu_bundle.sh: $(find "$FOLDER" -name '*.whl' | wc -l) wheels for Python $VERSION, $size MB, in $FOLDER"
if ((size > LIMIT_MB)); then
    echo "gpu_bundle.sh: that is more than $LIMIT_MB MB" >&2
    exit 1
fi
