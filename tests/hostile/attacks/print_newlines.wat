;; Prints 16 KiB of newlines 20 times through WASI. It cannot make more lines than its log may hold.
(module
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $i i32)
    (memory.fill (i32.const 64) (i32.const 10) (i32.const 16384))
    (i32.store (i32.const 0) (i32.const 64)) (i32.store (i32.const 4) (i32.const 16384))
    (loop $l
      (if (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)) (then (return (i32.const -1))))
      (br_if $l (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 20))))
    (i32.const 0)))
