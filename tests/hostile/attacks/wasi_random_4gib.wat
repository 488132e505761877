;; Asks WASI for 4 GiB of random bytes, and for 64 KiB at its memory's end. Refused: EINVAL, then EFAULT.
(module
  (import "wasi_snapshot_preview1" "random_get" (func $random_get (param i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (i32.sub (i32.add (i32.shl (call $random_get (i32.const 0) (i32.const -1)) (i32.const 8)) (call $random_get (i32.const 8) (i32.const 65536))) (i32.const 7189))))
