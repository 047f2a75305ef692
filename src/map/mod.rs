//! Stack maps: what is known about a frame, by program counter.
//!
//! ```text
//!   compiler ──> llvm, cranelift ──> recorded::Frame ──> table
//! ```

#[cfg(feature = "cranelift")]
pub mod cranelift;
pub mod llvm;
pub mod recorded;
