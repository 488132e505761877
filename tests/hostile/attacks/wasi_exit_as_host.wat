;; Leaves by proc_exit(-13), the host's own failure. Reported as the guest's own error.
(module
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (call $proc_exit (i32.const -13)) (i32.const 7)))
