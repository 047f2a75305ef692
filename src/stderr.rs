//! Standard error without allocating: for what is written in the fault handler.

use core::fmt;

/// Standard error through a small buffer, with plain system calls: one for each line that the buffer holds.
pub(crate) struct Stderr {
    buffer: [u8; 512],
    used: usize,
}

impl Stderr {
    pub(crate) const fn new() -> Self {
        Self { buffer: [0; 512], used: 0 }
    }

    /// Writes what is in the buffer.
    pub(crate) fn flush(&mut self) {
        let mut rest = &self.buffer[..self.used];
        while !rest.is_empty() {
            // SAFETY: the kernel reads so many bytes of the buffer, which is borrowed meanwhile.
            let written = unsafe { libc::write(libc::STDERR_FILENO, rest.as_ptr().cast(), rest.len()) };
            let Ok(written @ 1..) = usize::try_from(written) else { break };
            rest = rest.get(written..).unwrap_or_default();
        }
        self.used = 0;
    }
}

impl fmt::Write for Stderr {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for &byte in text.as_bytes() {
            if self.used == self.buffer.len() {
                self.flush();
            }
            self.buffer[self.used] = byte;
            self.used += 1;
            if byte == b'\n' {
                self.flush();
            }
        }
        Ok(())
    }
}
