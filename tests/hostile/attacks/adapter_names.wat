;; Applies adapters by names that are none: no UTF-8, too long, paths, parts of others. Refused; returns how many were not.
(module
  (import "realm" "seq_new" (func $seq_new (result i32)))
  (import "realm" "seq_len" (func $seq_len (param i32) (result i32)))
  (import "realm" "forward" (func $forward (param i32 i32 i32 i32 i32) (result i32)))
  (import "realm" "lora_apply" (func $lora_apply (param i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 64) "\ff\fe\c3\28\ed\a0\80\c0\af")
  (data (i32.const 128) "../../etc/passwd\00.safetensors")
  (data (i32.const 192) "canary/legal")
  (data (i32.const 256) "\1b[2J\0d\0a")
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $try (param $at i32) (param $size i32) (param $code i32) (result i32)
    (i32.ne (call $lora_apply (i32.const 1) (local.get $at) (local.get $size)) (local.get $code)))
  (func $run (export "run") (result i32) (local $n i32) (local $i i32)
    (drop (call $seq_new))
    (drop (call $forward (i32.const 1) (i32.const 1024) (i32.const 4) (i32.const 0) (i32.const 0)))
    ;; No UTF-8, at each length and from each byte of it.
    (loop $l
      (local.set $n (i32.add (local.get $n) (call $try (i32.add (i32.const 64) (local.get $i)) (i32.sub (i32.const 9) (local.get $i)) (i32.const -12))))
      (br_if $l (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 9))))
    ;; Too long, by one and by everything.
    (local.set $n (i32.add (local.get $n) (call $try (i32.const 4096) (i32.const 129) (i32.const -1))))
    (local.set $n (i32.add (local.get $n) (call $try (i32.const 0) (i32.const -1) (i32.const -1))))
    ;; Nothing, but outside.
    (local.set $n (i32.add (local.get $n) (call $try (i32.const 65537) (i32.const 0) (i32.const -2))))
    (local.set $n (i32.add (local.get $n) (call $try (i32.const 65535) (i32.const 2) (i32.const -2))))
    ;; Names of nobody: zeros as long as may be, a path, another tenant's, a terminal's.
    (local.set $n (i32.add (local.get $n) (call $try (i32.const 4096) (i32.const 128) (i32.const -7))))
    (local.set $n (i32.add (local.get $n) (call $try (i32.const 128) (i32.const 29) (i32.const -7))))
    (local.set $n (i32.add (local.get $n) (call $try (i32.const 192) (i32.const 12) (i32.const -7))))
    (local.set $n (i32.add (local.get $n) (call $try (i32.const 192) (i32.const 6) (i32.const -7))))
    (local.set $n (i32.add (local.get $n) (call $try (i32.const 256) (i32.const 6) (i32.const -7))))
    ;; What it had is still there.
    (i32.add (local.get $n) (i32.ne (call $seq_len (i32.const 1)) (i32.const 4)))))
