#!/bin/sh
# Settings that are secrets come as files: /run/secrets/NEXUS_SECTION__KEY is the variable of that name.
set -eu
for file in "${SECRETS_FOLDER:-/run/secrets}"/NEXUS_* "${SECRETS_FOLDER:-/run/secrets}"/ARANGO_*; do
    if [ -f "$file" ]; then
        value=$(cat "$file")
        export "$(basename "$file")=$value"
    fi
done
exec "$@"
