#!/usr/bin/env bash
# Builds the server's image with docker, or with buildah where there is no Docker engine.
#   deploy/build-image.sh                  from BASE_IMAGE (default: the Dockerfile's)
#   BASE=rootfs deploy/build-image.sh      no image registry: a Debian root file system made by mmdebstrap is the base
# Environment: IMAGE (tag of the result), BASE_IMAGE, TORCH_INDEX_URL (empty = the package index's own torch build),
# EXTRAS (of pyproject.toml, separated by commas: telemetry),
# STORE (folder of buildah's and podman's images; default: the user's own), CACHE (where the root file system is kept).
# The result's tag is the last line printed.
set -euo pipefail
cd "$(dirname "$0")/.."

version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml | head -n 1)
revision=$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
IMAGE=${IMAGE:-localhost/flan-serve:$version}
CACHE=${CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/flan-serve/image}
args=(--build-arg "VERSION=$version" --build-arg "REVISION=$revision" --tag "$IMAGE")
[ -z "${BASE_IMAGE:-}" ] || args+=(--build-arg "BASE_IMAGE=$BASE_IMAGE")
[ -z "${EXTRAS:-}" ] || args+=(--build-arg "EXTRAS=$EXTRAS")
[ -z "${TORCH_INDEX_URL+set}" ] || args+=(--build-arg "TORCH_INDEX_URL=$TORCH_INDEX_URL")

store=()
if [ -n "${STORE:-}" ]; then
  export STORAGE_DRIVER=${STORAGE_DRIVER:-overlay}
  store=(--root "$STORE/root" --runroot "$STORE/run")
fi

# A root file system, tagged as a base image. Made once; delete the tar to make it anew.
rootfs_base() {
  local tar=$CACHE/bookworm.tar image=localhost/flan-base:bookworm container
  if [ ! -s "$tar" ]; then
    mkdir -p "$CACHE"
    mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$tar.partial" >&2
    mv "$tar.partial" "$tar"
  fi
  if ! buildah "${store[@]}" inspect --type image "$image" >/dev/null 2>&1; then
    container=$(buildah "${store[@]}" from scratch)
    buildah "${store[@]}" add "$container" "$tar" / >/dev/null
    buildah "${store[@]}" commit --quiet --rm "$container" "$image" >/dev/null
  fi
  echo "$image"
}

# pip inside the build sees what pip on this machine sees: its configuration, certificates and local package folders.
pip_mounts() {
  local conf=$1 path
  { python3 -m pip config list 2>/dev/null || true; } | sed -nE "s/^[^.]+\.([a-z-]+)='(.*)'\$/\1 = \2/p" \
    | awk -F ' = ' '{ value[$1] = $0 } END { print "[global]"; for (key in value) print value[key] }' >"$conf"
  echo "$conf:/etc/pip.conf:ro"
  for path in /etc/ssl/certs $(grep -oE '/[A-Za-z0-9._/-]+' "$conf" | sed 's#^//*#/#' | sort -u); do
    path=${path%/simple} # a local index keeps its files beside its pages
    case $path in /etc/ssl/certs/*) continue ;; esac
    [ ! -e "$path" ] || echo "$path:$path:ro"
  done
}

if [ "${BASE:-}" != rootfs ] && docker info >/dev/null 2>&1; then
  DOCKER_BUILDKIT=1 docker build "${args[@]}" .
else
  # chroot isolation needs no cgroup or network set-up, so this also works inside a container.
  options=(--layers --isolation chroot --network host)
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  if [ "${BASE:-}" = rootfs ]; then
    base=$(rootfs_base)
    options+=(--pull-never --build-arg "BASE_IMAGE=$base")
    while read -r mount; do options+=(--volume "$mount"); done < <(pip_mounts "$scratch/pip.conf")
  fi
  buildah "${store[@]}" bud "${options[@]}" "${args[@]}" .
fi
echo "$IMAGE"
