;; Asks 500 times for an adapter that there is not and then for none. Each is answered; returns how many were not.
(module
  (import "realm" "seq_new" (func $seq_new (result i32)))
  (import "realm" "forward" (func $forward (param i32 i32 i32 i32 i32) (result i32)))
  (import "realm" "lora_apply" (func $lora_apply (param i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $s i32) (local $n i32) (local $i i32)
    (local.set $s (call $seq_new))
    (loop $l
      (i32.store (i32.const 0) (i32.add (i32.const 0x21212121) (i32.and (local.get $i) (i32.const 63))))
      (local.set $n (i32.add (local.get $n) (i32.ne (call $lora_apply (local.get $s) (i32.const 0) (i32.const 4)) (i32.const -7))))
      (local.set $n (i32.add (local.get $n) (i32.ne (call $lora_apply (local.get $s) (i32.const 0) (i32.const 0)) (i32.const 0))))
      (if (i32.eqz (i32.rem_u (local.get $i) (i32.const 50))) (then
        (local.set $n (i32.add (local.get $n) (i32.ne (call $forward (local.get $s) (i32.const 64) (i32.const 1) (i32.const 0) (i32.const 0)) (i32.const 0))))))
      (br_if $l (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 500))))
    (local.get $n)))
