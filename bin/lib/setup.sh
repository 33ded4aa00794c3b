# shellcheck shell=bash
# Set-up for bin/quickstart and bin/check, which source it: `blockferry_setup ROOT` brings a Debian machine with Node 20 to the point
# where everything in ROOT is built and can be tested. It says nothing and takes under two seconds when nothing is missing;
# it shows a step's output only when the step fails. Packages are installed as root; anybody else is told the command.

setup_node_min=20.19
setup_qemu_major_min=8 # Debian 12's own QEMU 7.2 loses dirty RAM pages of guests without KVM
setup_kernel_package=linux-image-cloud-amd64 # the test guest's: downloaded when it is built, never installed
setup_packages=(
  g++ make python3 # the native addon, the test guest, the WAN link
  nbdkit libnbd-bin python3-libnbd nbd-client nbd-server fio # real clients and servers to test with; libnbd-bin has nbdfuse
  busybox-static e2fsprogs cpio binutils # the test guest
  iproute2 iperf3 iputils-ping socat util-linux openssl
)
setup_qemu_packages=(qemu-system-x86 qemu-utils)
setup_apt_options=(-y -q --no-install-recommends -o DPkg::Lock::Timeout=300)
setup_os_release=/etc/os-release
setup_backports_file=/etc/apt/sources.list.d/blockferry-backports.sources

setup_say() { printf 'blockferry set-up: %s\n' "$*"; }

setup_fail() {
  printf 'blockferry set-up: %s\n' "$*" >&2
  exit 1
}

# setup_step WHAT COMMAND...: quiet; on failure its output and exit.
setup_step() {
  local what=$1 log
  shift
  log=$(mktemp)
  setup_say "$what"
  if ! "$@" >"$log" 2>&1 </dev/null; then
    cat "$log" >&2
    rm -f "$log"
    setup_fail "failed: $what (its output is above)"
  fi
  rm -f "$log"
}

# The first Debian archive of this machine that has SUITE: "URI<TAB>SIGNED-BY". Reads both of apt's formats. Other vendors'
# archives use Debian's suite names too, so what is signed with another key than Debian's does not count.
setup_archive_of() {
  local suite=$1 folder=${SETUP_APT_ETC:-/etc/apt}
  { cat "$folder"/sources.list "$folder"/sources.list.d/*.list 2>/dev/null || true; } | awk -v suite="$suite" '
    $1 == "deb" {
      signed = ""; i = 2
      if ($i ~ /^\[/) {
        for (; i <= NF; i++) {
          word = $i; gsub(/[\[\]]/, "", word)
          if (word ~ /^signed-by=/) signed = substr(word, 11)
          if ($i ~ /\]$/) { i++; break }
        }
      }
      if ($(i + 1) != suite || (signed != "" && signed !~ /debian-archive/)) next
      for (c = i + 2; c <= NF; c++) if ($c == "main") { print $i "\t" signed; exit }
    }'
  { for file in "$folder"/sources.list.d/*.sources; do [ -e "$file" ] && cat "$file" && echo; done || true; } | awk -v suite="$suite" '
    function has(field, wanted,  words, n, i) {
      n = split(value[field], words, " ")
      for (i = 1; i <= n; i++) if (words[i] == wanted) return 1
      return 0
    }
    function stanza(  uris) {
      if (has("types", "deb") && has("suites", suite) && has("components", "main") && tolower(value["enabled"]) !~ /no|false|off|0/ &&
          (value["signed-by"] == "" || value["signed-by"] ~ /debian-archive/)) {
        split(value["uris"], uris, " ")
        print uris[1] "\t" value["signed-by"]
        found = 1; exit
      }
      split("", value); field = ""
    }
    /^#/ { next }
    /^[[:space:]]*$/ { stanza(); next }
    /^[[:space:]]/ { value[field] = value[field] " " $0; next }
    {
      colon = index($0, ":")
      field = tolower(substr($0, 1, colon - 1)); text = substr($0, colon + 1)
      sub(/^[[:space:]]+/, "", text); sub(/[[:space:]]+$/, "", text)
      value[field] = text
    }
    END { if (!found) stanza() }'
}

# The lines of an apt sources file for SUITE, at the archive where this machine gets CODENAME from.
setup_sources_for() {
  local suite=$1 codename=$2 archive uri signed
  archive=$(setup_archive_of "$codename" | head -n 1)
  [ -n "$archive" ] || return 1
  uri=${archive%%$'\t'*} signed=${archive#*$'\t'}
  printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\n' "$uri" "$suite"
  [ -z "$signed" ] || printf 'Signed-By: %s\n' "$signed"
}

setup_candidate() { apt-cache policy "$1" 2>/dev/null | awk '$1 == "Candidate:" && $2 != "(none)" { print $2; exit }'; }

# Upstream's major version in a Debian version: 1:10.0.2+ds-2 -> 10.
setup_major() {
  local version=${1#*:}
  printf '%s' "${version%%.*}"
}

setup_qemu_ready() {
  local words
  words=$(qemu-system-x86_64 --version 2>/dev/null | head -n 1) || return 1
  [[ $words =~ version\ ([0-9]+)\. ]] && [ "${BASH_REMATCH[1]}" -ge "$setup_qemu_major_min" ] && command -v qemu-nbd >/dev/null
}

setup_missing_packages() {
  local package installed
  installed=" $(dpkg-query -W -f '${Package}:${db:Status-Status} ' "${setup_packages[@]}" 2>/dev/null || true)"
  for package in "${setup_packages[@]}"; do
    [[ $installed == *" $package:installed "* ]] || echo "$package"
  done
}

setup_apt() {
  local missing=() qemu=() release=() codename suite sources update=no package
  mapfile -t missing < <(setup_missing_packages)
  setup_qemu_ready || qemu=("${setup_qemu_packages[@]}")
  for package in ${missing[@]+"${missing[@]}"} ${qemu[@]+"${qemu[@]}"} "$setup_kernel_package"; do
    [ -n "$(setup_candidate "$package")" ] || update=yes
  done
  [ ${#missing[@]} -gt 0 ] || [ ${#qemu[@]} -gt 0 ] || [ $update = yes ] || return 0

  codename=$(. "$(realpath "$setup_os_release")" && echo "${VERSION_CODENAME:-}")
  suite=$codename-backports sources=
  # Debian 13 and later have a QEMU of their own that is new enough.
  if [ ${#qemu[@]} -gt 0 ] && [ "$codename" = bookworm ]; then
    release=(-t "$suite")
    if [ -z "$(setup_archive_of "$suite")" ]; then
      sources=$(setup_sources_for "$suite" "$codename") ||
        setup_fail "needs QEMU $setup_qemu_major_min or newer, and found no Debian archive in /etc/apt to take $suite from"
      update=yes
    elif [ "$(setup_major "$(apt-cache madison qemu-system-x86 2>/dev/null | awk 'NR == 1 { print $3 }')")" -lt "$setup_qemu_major_min" ] 2>/dev/null; then
      update=yes
    fi
  fi
  if [ "$(id -u)" != 0 ]; then
    setup_tell_command "$update" "$sources" "${missing[*]-}" "${release[*]-}" "${qemu[*]-}"
    exit 1
  fi

  export DEBIAN_FRONTEND=noninteractive
  [ -z "$sources" ] || printf '%s\n' "$sources" >"$setup_backports_file"
  [ $update = no ] || setup_step 'reading the package lists' apt-get update
  [ ${#missing[@]} -eq 0 ] || setup_install "${missing[@]}"
  [ ${#qemu[@]} -eq 0 ] || setup_install ${release[@]+"${release[@]}"} "${qemu[@]}"
  [ ${#qemu[@]} -eq 0 ] || setup_qemu_ready || setup_fail "QEMU is still older than $setup_qemu_major_min: $(qemu-system-x86_64 --version | head -n 1)"
}

# With one more try on fresh lists: old ones name packages that are not there any more.
setup_install() {
  if ! apt-get install --download-only "${setup_apt_options[@]}" "$@" >/dev/null 2>&1 </dev/null; then
    setup_step 'reading the package lists' apt-get update
  fi
  setup_step "installing $*" apt-get install "${setup_apt_options[@]}" "$@"
}

setup_tell_command() {
  local update=$1 sources=$2 missing=$3 release=$4 qemu=$5 command=()
  {
    if [ -n "$missing$qemu" ]; then
      printf 'blockferry set-up: packages are missing: %s\n' "$missing${missing:+${qemu:+ }}$qemu"
      [ -z "$qemu" ] || printf '(qemu-system-x86 in version %s or newer)\n' "$setup_qemu_major_min"
    else
      printf 'blockferry set-up: apt does not know %s: its package lists are empty\n' "$setup_kernel_package"
    fi
    [ -z "$sources" ] || command+=("printf '%s\\n' $(printf "'%s' " "${sources//$'\n'/"' '"}")>$setup_backports_file")
    [ "$update" = no ] || command+=('apt-get update')
    [ -z "$missing" ] || command+=("apt-get install -y --no-install-recommends $missing")
    [ -z "$qemu" ] || command+=("apt-get install -y --no-install-recommends ${release:+$release }$qemu")
    local line=${command[0]} part
    for part in "${command[@]:1}"; do line+=" && $part"; done
    printf 'Run as root:\n  %s\n' "$line"
  } >&2
}

setup_node() {
  command -v node >/dev/null && command -v npm >/dev/null ||
    setup_fail "needs Node.js $setup_node_min or newer with npm: install it, then run this again"
  node -e "const [a, b] = process.versions.node.split('.'), [c, d] = '$setup_node_min'.split('.'); process.exit(+a > +c || (a === c && +b >= +d) ? 0 : 1)" ||
    setup_fail "needs Node.js $setup_node_min or newer, this is $(node --version)"
}

# True if node_modules holds what package-lock.json says.
setup_modules_ready() {
  node -e '
    const { readFileSync } = require("node:fs");
    const read = (path) => JSON.parse(readFileSync(path, "utf8")).packages;
    const there = read("node_modules/.package-lock.json");
    for (const [path, { integrity, optional }] of Object.entries(read("package-lock.json"))) {
      if (path !== "" && !optional && there[path]?.integrity !== integrity) process.exit(1);
    }' 2>/dev/null
}

# True if PRODUCT exists and none of the files and folders that follow is newer.
setup_up_to_date() {
  local product=$1
  shift
  [ -e "$product" ] && [ -z "$(find "$@" -newer "$product" -print -quit 2>/dev/null)" ]
}

setup_build() {
  local prefix addon=native/build/Release/blockferry.node sources=() folder
  prefix=$(dirname "$(dirname "$(readlink -f "$(command -v node)")")")
  # Node's headers are here already: node-gyp need not download them.
  if [ -e "$prefix/include/node/node_api.h" ]; then export npm_config_nodedir=$prefix; fi
  # npm ci builds the addon and dist as well. What an older source left in dist must not be run as a test.
  if ! setup_modules_ready; then
    rm -rf dist
    setup_step 'npm ci' npm ci --include=dev --no-audit --no-fund
  fi
  # Where npm runs no scripts of dependencies, or a download was refused half way.
  if [ ! -e node_modules/zstd-napi/build/Release/binding.node ]; then
    setup_step 'building zstd-napi' npm rebuild zstd-napi
  fi
  if ! setup_up_to_date "$addon" native/src native/load native/binding.gyp; then
    setup_step 'building the native addon' npm run install
    touch "$addon"
  fi
  for folder in src test bench; do [ ! -d $folder ] || sources+=("$folder"); done
  if ! setup_up_to_date dist/.tsbuildinfo "${sources[@]}" tsconfig.json package.json; then
    rm -rf dist
    setup_step 'npm run build' npm run build
  fi
}

# The one entry: leaves the shell in ROOT.
blockferry_setup() {
  cd "$1" || exit 1
  command -v apt-get >/dev/null && command -v dpkg-query >/dev/null ||
    setup_fail 'works on Debian (it installs packages with apt-get); on other systems see docs/ for what is needed'
  setup_node
  setup_apt
  setup_build
}
