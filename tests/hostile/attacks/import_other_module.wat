;; Imports from modules that hosts elsewhere have. Refused.
(module
  (import "env" "system" (func (param i32) (result i32)))
  (import "wasi_unstable" "proc_exit" (func (param i32)))
  (import "" "" (func))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func (export "run") (result i32) (i32.const 0)))
