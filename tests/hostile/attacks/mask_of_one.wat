;; Allows one token only and pushes its logit to minus infinity by biases that add up. The draw is that token or refused; returns 0.
(module
  (import "realm" "seq_new" (func $seq_new (result i32)))
  (import "realm" "forward" (func $forward (param i32 i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $s i32) (local $t i32)
    (local.set $s (call $seq_new))
    (i32.store8 (i32.const 4096) (i32.const 32)) (i32.store (i32.const 112) (i32.const 1536)) (i64.store (i32.const 96) (i64.const 4096))
    (i32.store (i32.const 116) (i32.const 2)) (i64.store (i32.const 104) (i64.const 160))
    (i32.store (i32.const 160) (i32.const 5)) (f32.store (i32.const 164) (f32.const -3.4e38)) (i32.store (i32.const 168) (i32.const 5)) (f32.store (i32.const 172) (f32.const -3.4e38))
    (f32.store (i32.const 64) (f32.const 1))
    (local.set $t (call $forward (local.get $s) (i32.const 128) (i32.const 1) (i32.const 64) (i32.const 0)))
    (i32.and (i32.ne (local.get $t) (i32.const 5)) (i32.ge_s (local.get $t) (i32.const 0)))))
