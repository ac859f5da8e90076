//! Resident memory of this process, as the kernel accounts it.

/// Highest resident set so far in bytes (`VmHWM`), where the system tells.
pub fn peak_bytes() -> Option<u64> {
    status_field("VmHWM:")
}

/// Resident set now in bytes (`VmRSS`), where the system tells.
pub fn resident_bytes() -> Option<u64> {
    status_field("VmRSS:")
}

fn status_field(field: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with(field))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}
