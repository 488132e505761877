;; Writes through WASI from buffers and lists outside its memory, or too many. EFAULT, EFAULT, EFAULT, EINVAL; returns how many were not.
(module
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $n i32)
    (i32.store (i32.const 0) (i32.const 65530)) (i32.store (i32.const 4) (i32.const 100))
    (if (i32.ne (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 16)) (i32.const 21)) (then (local.set $n (i32.add (local.get $n) (i32.const 1)))))
    (if (i32.ne (call $fd_write (i32.const 1) (i32.const -4) (i32.const 1) (i32.const 16)) (i32.const 21)) (then (local.set $n (i32.add (local.get $n) (i32.const 1)))))
    (if (i32.ne (call $fd_write (i32.const 1) (i32.const 32) (i32.const 1) (i32.const 65533)) (i32.const 21)) (then (local.set $n (i32.add (local.get $n) (i32.const 1)))))
    (if (i32.ne (call $fd_write (i32.const 1) (i32.const 32) (i32.const -1) (i32.const 16)) (i32.const 28)) (then (local.set $n (i32.add (local.get $n) (i32.const 1)))))
    (local.get $n)))
