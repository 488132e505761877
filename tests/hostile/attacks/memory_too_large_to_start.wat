;; Needs more memory to start than it may have. Ends as over its memory limit.
(module
  (memory (export "memory") 1024)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (i32.const 0)))
