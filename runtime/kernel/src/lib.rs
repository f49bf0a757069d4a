//! Every system call and `/proc` parser that Samara uses, behind safe types.
//!
//! One module per interface, named as its man page. This is the only crate with `unsafe` code.
