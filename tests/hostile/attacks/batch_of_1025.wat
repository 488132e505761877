;; Has a batch of 1,025 items, one of none, and one across its memory's end. Refused.
(module
  (import "realm" "batch_forward" (func $batch_forward (param i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (i32.or (i32.ne (call $batch_forward (i32.const 0) (i32.const 1025)) (i32.const -1))
      (i32.or (i32.ne (call $batch_forward (i32.const 0) (i32.const 0)) (i32.const -1))
        (i32.ne (call $batch_forward (i32.const 65500) (i32.const 1)) (i32.const -2))))))
