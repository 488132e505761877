;; Prints 1,024 times the same 60 KiB in one WASI call. Some of it is written, and it is told how much; the log holds its limit.
(module
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $i i32)
    (loop $l
      (i32.store (i32.shl (local.get $i) (i32.const 3)) (i32.const 0)) (i32.store offset=4 (i32.shl (local.get $i) (i32.const 3)) (i32.const 60000))
      (br_if $l (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 1024))))
    (i32.or (call $fd_write (i32.const 2) (i32.const 0) (i32.const 1024) (i32.const 65000)) (i32.gt_u (i32.load (i32.const 65000)) (i32.const 61440000)))))
