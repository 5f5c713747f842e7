//! What a kernel takes of a multiprocessor, read from the assembler's report (`ptxas -v`).

/// One kernel's needs.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Resources {
    /// Its entry point.
    pub kernel: String,
    /// Registers of a thread.
    pub registers: u32,
    /// Static shared memory of a block, bytes; dynamic memory is the launch's.
    pub shared_bytes: u32,
    /// Bytes of a thread's registers that are written to memory because they do not fit.
    pub spill_store_bytes: u32,
    /// Bytes of those that are read back.
    pub spill_load_bytes: u32,
    /// Local memory of a thread, bytes: spills, and arrays that are indexed at run time.
    pub stack_bytes: u32,
}

/// The number before `unit` in a list such as `Used 40 registers, used 1 barriers, 512 bytes smem`.
fn number(line: &str, unit: &str) -> Option<u32> {
    let (before, _) = line.split_once(unit)?;
    before.split_whitespace().next_back()?.parse().ok()
}

/// Reads a report; kernels come in its order.
///
/// # Errors
/// The line that is not as expected.
pub fn parse(report: &str) -> Result<Vec<Resources>, String> {
    let mut kernels: Vec<Resources> = Vec::new();
    for line in report.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let kernel = rest.split('\'').next().unwrap_or_default().to_owned();
            kernels.push(Resources {
                kernel,
                ..Resources::default()
            });
            continue;
        }
        let unexpected = || format!("not understood: {line}");
        if line.contains("bytes stack frame") {
            let last = kernels.last_mut().ok_or_else(unexpected)?;
            last.stack_bytes = number(line, " bytes stack frame").ok_or_else(unexpected)?;
            last.spill_store_bytes = number(line, " bytes spill stores").ok_or_else(unexpected)?;
            last.spill_load_bytes = number(line, " bytes spill loads").ok_or_else(unexpected)?;
        } else if line.contains(" registers") && line.contains("Used ") {
            let last = kernels.last_mut().ok_or_else(unexpected)?;
            last.registers = number(line, " registers").ok_or_else(unexpected)?;
            last.shared_bytes = number(line, " bytes smem").unwrap_or(0);
        }
    }
    match kernels.iter().find(|kernel| kernel.registers == 0) {
        Some(kernel) => Err(format!("{} has no line of registers", kernel.kernel)),
        None => Ok(kernels),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = "ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'one' for 'sm_90a'
ptxas info    : Function properties for one
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 8 bytes cumulative stack size, 1152 bytes smem
ptxas info    : Compile time = 10.000 ms
ptxas info    : Compiling entry function 'two' for 'sm_90a'
ptxas info    : Function properties for two
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 26 registers, used 0 barriers
";

    #[test]
    fn a_report_is_read() {
        let kernels = parse(REPORT).unwrap();
        let one = Resources {
            kernel: "one".to_owned(),
            registers: 255,
            shared_bytes: 1152,
            spill_store_bytes: 4,
            spill_load_bytes: 12,
            stack_bytes: 8,
        };
        let two = Resources {
            kernel: "two".to_owned(),
            registers: 26,
            ..Resources::default()
        };
        assert_eq!(kernels, [one, two]);
    }

    #[test]
    fn a_report_that_is_cut_short_is_an_error() {
        let cut = REPORT.find("ptxas info    : Used 26").unwrap();
        assert!(parse(&REPORT[..cut]).unwrap_err().contains("two"));
        assert!(parse("ptxas info    : Used 26 registers").is_err());
    }
}
