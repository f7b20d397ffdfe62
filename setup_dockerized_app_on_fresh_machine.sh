#!/usr/bin/env bash
# Brings the server up on a fresh Linux machine with Docker, and prints its address and token.
# Started again, it builds what is in this directory now and replaces its container; data and models stay.

set -euo pipefail

readonly name=llama-embeddings
readonly healthy_timeout_seconds="${HEALTHY_TIMEOUT_SECONDS:-300}"

usage() {
    cat <<'TEXT'
Usage: ./setup_dockerized_app_on_fresh_machine.sh [PORT [BIND_ADDRESS]]

  PORT          port of this machine to publish (or LLAMA_EMBEDDING_SERVER_LISTEN_PORT); 8089 by default
  BIND_ADDRESS  address of this machine to publish on (or BIND_ADDRESS); 0.0.0.0, all interfaces, by default,
                for callers need a token; 127.0.0.1 for this machine only

SECURITY_TOKEN chooses the token (at least 16 characters); without it one is made at the first start.
LLAMA_CMAKE_ARGS replaces the options llama.cpp is built with; by default it is built for this machine's processor.
TEXT
}

fail() {
    printf '%s\n' "$*" >&2
    exit 1
}

# as_root COMMAND...: runs a command with the rights to install software.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        fail "Installing Docker needs root: run this as root, or install sudo or Docker first."
    fi
}

install_docker() {
    printf 'Docker is missing, installing it\n'
    if command -v apt-get >/dev/null; then
        as_root apt-get update
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install --yes docker.io
    elif command -v dnf >/dev/null; then
        as_root dnf install --assumeyes docker || as_root dnf install --assumeyes moby-engine
    elif command -v yum >/dev/null; then
        as_root yum install --assumeyes docker
    elif command -v zypper >/dev/null; then
        as_root zypper --non-interactive install docker
    elif command -v pacman >/dev/null; then
        as_root pacman --sync --noconfirm docker
    elif command -v apk >/dev/null; then
        as_root apk add docker
    else
        fail "Docker is missing and this system's package manager is not known here: install Docker and start again."
    fi
    command -v docker >/dev/null || fail "Docker was installed but there is no docker command; open a new shell and start again."
}

# The daemon starts now and with the machine.
start_docker() {
    if [ -d /run/systemd/system ]; then
        as_root systemctl enable --now docker
    elif command -v rc-update >/dev/null; then
        as_root rc-update add docker default
        as_root rc-service docker start
    elif command -v service >/dev/null; then
        as_root service docker start
    fi
}

# docker as whoever may use it: this user, or root.
docker_command=(docker)

run_docker() {
    "${docker_command[@]}" "$@"
}

find_docker() {
    command -v docker >/dev/null || install_docker
    if docker info >/dev/null 2>&1; then
        return
    fi
    if [ "$(id -u)" -ne 0 ] && command -v sudo >/dev/null; then
        # SECURITY_TOKEN reaches the container by name only, so sudo must let it through.
        docker_command=(sudo --preserve-env=SECURITY_TOKEN docker)
        if run_docker info >/dev/null 2>&1; then
            return
        fi
    fi
    start_docker
    run_docker info >/dev/null || fail "Docker is installed but does not answer: see what 'docker info' says."
}

build_image() {
    local arguments="${LLAMA_CMAKE_ARGS:--DGGML_NATIVE=ON}"
    printf 'Building the image; the first time this takes some minutes\n'
    run_docker build --tag "$name" --build-arg "LLAMA_CMAKE_ARGS=$arguments" .
}

remove_old_container() {
    if [ -n "$(run_docker ps --all --quiet --filter "name=^/${name}\$")" ]; then
        printf 'Replacing the running container; its data and models stay\n'
        run_docker stop "$name" >/dev/null
        run_docker rm "$name" >/dev/null
    fi
}

run_container() {
    local token_option=() # expanded with care below: bash before 4.4 takes an empty array for an unset one
    if [ -n "${SECURITY_TOKEN:-}" ]; then
        export SECURITY_TOKEN
        token_option=(--env SECURITY_TOKEN)
    fi
    # The server takes up to some ten seconds to finish what is under way, Docker's default is ten in all.
    run_docker run --detach --name "$name" --restart unless-stopped --stop-timeout 20 \
        --publish "${bind_address}:${port}:8089" --volume llama_data:/data --volume llama_models:/models \
        ${token_option[@]+"${token_option[@]}"} "$name" >/dev/null
}

wait_until_healthy() {
    local status deadline=$((SECONDS + healthy_timeout_seconds))
    printf 'Waiting for the server\n'
    while status="$(run_docker inspect --format '{{.State.Health.Status}}' "$name")"; do
        if [ "$status" = healthy ]; then
            return
        fi
        if [ "$status" = unhealthy ] || [ "$SECONDS" -ge "$deadline" ]; then
            break
        fi
        sleep 1
    done
    run_docker logs --tail 50 "$name" >&2 || true
    fail "The server did not become healthy within ${healthy_timeout_seconds} seconds; its last messages are above."
}

print_address_and_token() {
    local address="$bind_address" token="${SECURITY_TOKEN:-}"
    if [ "$address" = 0.0.0.0 ]; then
        # The first address of this machine, as others see it.
        address="$(hostname -I 2>/dev/null | awk '{print $1}')" || address=
        address="${address:-127.0.0.1}"
    fi
    if [ -z "$token" ]; then
        token="$(run_docker exec "$name" cat /data/security_token)"
    fi
    printf '\nThe server answers on http://%s:%s/\nToken: %s\n' "$address" "$port" "$token"
}

case "${1:-}" in
    -h | --help)
        usage
        exit 0
        ;;
esac

port="${1:-${LLAMA_EMBEDDING_SERVER_LISTEN_PORT:-8089}}"
bind_address="${2:-${BIND_ADDRESS:-0.0.0.0}}"
if ! [[ "$port" =~ ^[0-9]{1,5}$ ]] || [ "$((10#$port))" -lt 1 ] || [ "$((10#$port))" -gt 65535 ]; then
    fail "The port must be a number from 1 to 65535, not '$port'."
fi
if [ -n "${SECURITY_TOKEN:-}" ] && [ "${#SECURITY_TOKEN}" -lt 16 ]; then
    fail "SECURITY_TOKEN must have at least 16 characters."
fi
if [[ "$bind_address" = *:* && "$bind_address" != \[* ]]; then
    bind_address="[$bind_address]" # as both Docker and URLs write IPv6
fi
cd "$(dirname "${BASH_SOURCE[0]}")"

find_docker
build_image
remove_old_container
run_container
wait_until_healthy
print_address_and_token
