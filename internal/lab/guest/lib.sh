# Shell functions of the guest, for its init and for the caller's script.
# What they print is what the host parses (console.go).

# mark NAME: a milestone, with the seconds since the kernel started.
mark() {
	read -r uptime _ </proc/uptime
	echo "KEYAGENT-MARK $uptime $1"
}

# await NAME: a milestone at which the guest stands still until the host says go.
await() {
	mark "$1"
	read -r _ </dev/console
}

# section NAME FILE: the content of a file, in base64. Every line names the
# section, so that a kernel message in between does no harm.
section() {
	base64 -w 76 <"$2" | while read -r line; do echo "KEYAGENT-DATA $1 $line"; done
	echo "KEYAGENT-END $1 $(wc -c <"$2")"
}

# pcrs: the SHA-256 bank as the kernel reads it.
pcrs() {
	for pcr in 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do
		echo "KEYAGENT-PCR $pcr $(cat /sys/class/tpm/tpm0/pcr-sha256/$pcr)"
	done
}

# eventlog: the firmware's event log as section "eventlog".
eventlog() {
	section eventlog /sys/kernel/security/tpm0/binary_bios_measurements
}
