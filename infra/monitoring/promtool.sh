#!/usr/bin/env bash
# Prints where promtool is: on the machine, or in a folder into which Debian's package is unpacked, which needs no root.
# Fails where there is neither.
#
#   promtool.sh FOLDER
set -euo pipefail

command -v promtool && exit
folder=$1/promtool
if [[ ! -x $folder/usr/bin/promtool ]]; then
  mkdir -p "$1"
  unpacked=$(mktemp -d "$1/promtool.XXXXXX")
  trap 'rm -rf "$unpacked"' EXIT
  (cd "$unpacked" && timeout 120 apt-get download prometheus && dpkg -x prometheus_*.deb . && rm prometheus_*.deb) >&2
  rm -rf "$folder"
  mv "$unpacked" "$folder"
fi
echo "$folder/usr/bin/promtool"
