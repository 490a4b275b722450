#!/usr/bin/env bash
# Makes what compose.yaml wants: secrets of this installation alone, nexus.yaml, and the variables. Overwrites nothing.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: install.sh [--domain NAME --email ADDRESS] [--folder FOLDER] [--hades --accept-arangodb-licence]
                  [--gpu --models FOLDER] [--dry-run]

  --domain NAME     The name that clients use; HTTPS by Let's Encrypt. Without it: http://localhost:8080, for trying.
  --email ADDRESS   Where Let's Encrypt writes to.
  --folder FOLDER   Where secrets and settings go (default: ~/.config/nexus-compose).
  --hades           Milvus and ArangoDB in containers of their own, in place of Milvus Lite and SQLite.
  --gpu             The image with vLLM and all GPUs; --models names the folder with the models.
  --dry-run         Say what would be made, and make nothing.

What is there already stays as it is; a second run makes what is missing.
TEXT
}

fail() {
    echo "install.sh: $*" >&2
    exit 1
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=${HOME:?}/.config/nexus-compose
domain='' email='' models='' hades='' accepted='' gpu='' dry=''

value_of() {
    [ -n "${2:-}" ] || { echo "install.sh: $1 wants a value" >&2; exit 2; }
    printf '%s' "$2"
}

while [ $# -gt 0 ]; do
    case $1 in
        --domain) domain=$(value_of "$@"); shift ;;
        --email) email=$(value_of "$@"); shift ;;
        --folder) folder=$(value_of "$@"); shift ;;
        --models) models=$(value_of "$@"); shift ;;
        --hades) hades=yes ;;
        --accept-arangodb-licence) accepted=yes ;;
        --gpu) gpu=yes ;;
        --dry-run) dry=yes ;;
        --help | -h) usage; exit 0 ;;
        *) echo "install.sh: there is no option $1" >&2; usage >&2; exit 2 ;;
    esac
    shift
done

# ── what was asked for ──────────────────────────────────────────────────────────────────────────

if [ -n "$domain" ]; then
    [[ $domain =~ ^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)+$ ]] \
        || fail "--domain $domain is no name such as nexus.example.com (in small letters)"
    [[ $email =~ ^[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\.[a-z]+$ ]] \
        || fail "--domain wants an --email, which Let's Encrypt writes to before a certificate ends"
elif [ -n "$email" ]; then
    fail "--email is for --domain; http://localhost has no certificate"
fi
if [ -n "$gpu" ]; then
    [ -d "$models" ] || fail "--gpu wants --models FOLDER, which is there"
elif [ -n "$models" ]; then
    fail "--models is for --gpu"
fi
if [ -n "$hades" ] && [ -z "$accepted" ]; then
    cat >&2 <<'TEXT'
ArangoDB is no part of Nexus. Its source is under the Business Source License 1.1. The Community Edition from 3.12.5 on
may not be used commercially in production, nor be distributed or embedded in other products; with more than 100 GiB of
data it warns for two days, can only be read for two more, and then stops. Its makers give other licences. MinIO, which
Milvus keeps its data in, is under the AGPL 3.
TEXT
    fail "say --accept-arangodb-licence if that is fine"
fi
[[ $folder = /* ]] || folder=$PWD/$folder
[[ $folder$here$models != *[[:space:]\$\"\'\\:]* ]] \
    || fail "the folders must have no spaces, quotes, colons, \$ or backslashes in their names"

# ── what has to be there ────────────────────────────────────────────────────────────────────────

for program in docker openssl; do
    command -v "$program" > /dev/null || missing="${missing:-} $program"
done
if [ -z "${missing:-}" ] && ! docker compose version > /dev/null 2>&1; then
    missing=' docker-compose-plugin (docker compose)'
fi
if [ -n "${missing:-}" ]; then
    [ -n "$dry" ] || fail "missing:$missing"
    echo "missing:$missing"
fi

# Containers run as whoever installs, so that they can read secrets that nobody else can; as root's stand-in 10001.
uid=$(id -u) gid=$(id -g)
if [ "$uid" = 0 ]; then uid=10001 gid=10001; fi

# ── files ───────────────────────────────────────────────────────────────────────────────────────

# make FILE: what comes in becomes the file, its owner's alone, unless it is there; it is whole from its first moment.
make() {
    local file=$folder/$1 content
    content=$(cat)
    [ -n "$content" ] || fail "nothing was made for $file, and so it is not written"
    if [ -e "$file" ]; then
        echo "there already: $file"
    elif [ -n "$dry" ]; then
        echo "would make:    $file"
    else
        (umask 077 && printf '%s\n' "$content" > "$file.part")
        if [ "$(id -u)" = 0 ]; then chown "$uid:$gid" "$file.part"; fi
        mv -n "$file.part" "$file"
        echo "made:          $file"
    fi
}

random() { openssl rand -hex 32; }

# What is in a secret that is there, or in a dry run a stand-in.
secret() { if [ -n "$dry" ]; then echo none; else cat "$folder/secrets/$1"; fi; }

if [ -z "$dry" ]; then
    mkdir -p "$folder/secrets"
    chmod 700 "$folder" "$folder/secrets"
    if [ "$(id -u)" = 0 ]; then chown "$uid:$gid" "$folder" "$folder/secrets"; fi
fi

random | make secrets/sharing-key
if [ -n "$hades" ]; then
    openssl rand -hex 8 | make secrets/minio-user        # MinIO takes 20 signs, and 40
    openssl rand -hex 20 | make secrets/minio-password
    random | make secrets/milvus-password
    random | make secrets/arangodb-root-password
    random | make secrets/arangodb-password
    echo "milvus://root:$(secret milvus-password)@milvus:19530" | make secrets/stores-vectors
    echo "arango://nexus:$(secret arangodb-password)@arangodb:8529/nexus" | make secrets/stores-documents
    echo "arango://root:$(secret arangodb-root-password)@arangodb:8529/nexus" | make secrets/arangodb-administrator
fi

make nexus.yaml <<TEXT
# The settings of this installation; docs/operate.md describes them. Yours to change.
http:
  allowed_hosts: [${domain}]
access:
  mode: production
TEXT

files=$here/compose.yaml
if [ -n "$hades" ]; then files=$files:$here/compose.hades.yaml; fi
if [ -n "$gpu" ]; then files=$files:$here/compose.gpu.yaml; fi
variables=$(
    cat <<TEXT
COMPOSE_FILE=$files
NEXUS_FILES=$folder
NEXUS_UID=$uid
NEXUS_GID=$gid
NEXUS_SITE=${domain:-http://localhost:8080}
NEXUS_EMAIL=${email:-nobody@localhost}
NEXUS_HTTP=$([ -n "$domain" ] && echo 80 || echo 127.0.0.1:8080)
NEXUS_HTTPS=$([ -n "$domain" ] && echo 443 || echo 127.0.0.1:8443)
NEXUS_TMP=$([ -n "$gpu" ] && echo 16g || echo 2g)
NEXUS_SHM=$([ -n "$gpu" ] && echo 16g || echo 1g)
NEXUS_MODELS=$models
TEXT
)
make .env <<< "$variables"
if [ -e "$folder/.env" ] && [ "$(cat "$folder/.env")" != "$variables" ]; then
    fail "$folder/.env is of other options, and stays: change it by hand, or move it away and say this again"
fi

echo
echo "Start it:      docker compose --env-file $folder/.env up --build --detach --wait"
echo "Its admin key: docker compose --env-file $folder/.env exec nexus cat /var/lib/nexus/admin-key"
echo "Stop it:       docker compose --env-file $folder/.env down      (volumes stay)"
if [ -n "$domain" ]; then
    echo "It answers at https://$domain, once that name leads here and ports 80 and 443 are open."
else
    echo "It answers at http://localhost:8080, on this machine alone."
fi
echo "Keep a copy of $folder/secrets elsewhere: without sharing-key no shared block can be read."
