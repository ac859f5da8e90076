//! Memory of this process and of the machine, as the kernel accounts it.

/// Highest resident set so far in bytes (`VmHWM`), where the system tells.
pub fn peak_bytes() -> Option<u64> {
    field("/proc/self/status", "VmHWM:")
}

/// Resident set now in bytes (`VmRSS`), where the system tells.
pub fn resident_bytes() -> Option<u64> {
    field("/proc/self/status", "VmRSS:")
}

fn field(file: &str, name: &str) -> Option<u64> {
    let status = std::fs::read_to_string(file).ok()?;
    let line = status.lines().find(|line| line.starts_with(name))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Memory of the machine in bytes, where the system tells.
pub fn total_bytes() -> Option<u64> {
    field("/proc/meminfo", "MemTotal:")
}

/// Memory that can be taken without swapping, in bytes, where the system tells.
pub fn available_bytes() -> Option<u64> {
    field("/proc/meminfo", "MemAvailable:")
}
