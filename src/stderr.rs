//! Standard error without allocating, for the fault handler.

use core::fmt;

/// Standard error through a small buffer, with one plain system call for each line that fits into it.
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
            let Ok(written @ 1..) = usize::try_from(write(rest)) else { break };
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

/// Writes the beginning of `text` to standard error. Returns the number of bytes written, or -1.
pub(crate) fn write(text: &[u8]) -> isize {
    // SAFETY: the kernel reads only the bytes of a borrowed slice.
    unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len()) }
}
