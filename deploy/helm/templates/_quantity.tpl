{{- /*
KubeRay reads a RayService into Kubernetes' Go types and writes it back. What those write in another way than we did
would be KubeRay's from then on, and the next server-side apply (Helm 4) a conflict. So resources are written as Go
writes them: each quantity with the largest suffix that leaves a whole number, 1024Mi as 1Gi, 0.5 as 500m, 8 as "8".
*/ -}}
{{- define "backpack.resources" -}}
{{- $resources := deepCopy . }}
{{- range $kind := list "requests" "limits" }}
{{- with get $resources $kind }}
{{- $written := dict }}
{{- range $name, $quantity := . }}{{ $_ := set $written $name (include "backpack.quantity" $quantity) }}{{ end }}
{{- $_ := set $resources $kind $written }}
{{- else }}
{{- $_ := unset $resources $kind }}
{{- end }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{- define "backpack.quantity" -}}
{{- $text := kindIs "string" . | ternary . (toJson .) }}
{{- $digits := regexFind "^[0-9.]+" $text }}
{{- $suffix := trimPrefix $digits $text }}
{{- $parts := splitList "." $digits }}
{{- $fraction := "" }}{{ if gt (len $parts) 1 }}{{ $fraction = regexReplaceAll "0+$" (last $parts) "" }}{{ end }}
{{- /* n · 10^e of the suffix; leading zeros would make it octal */ -}}
{{- $n := regexReplaceAll "^0+" (print (first $parts) $fraction) "" | default "0" | int64 }}
{{- $e := sub 0 (len $fraction) }}
{{- if hasSuffix "i" $suffix }}
{{- $power := get (dict "Ki" 1 "Mi" 2 "Gi" 3 "Ti" 4 "Pi" 5 "Ei" 6) $suffix }}
{{- range until 6 }}
{{- if and (lt $e 0) (gt $power 0) }}{{ $n = mul $n 1024 }}{{ $power = sub $power 1 }}{{ end }}
{{- range until 20 }}{{ if and (lt $e 0) (eq (mod $n 10) 0) }}{{ $n = div $n 10 }}{{ $e = add $e 1 }}{{ end }}{{ end }}
{{- end }}
{{- if lt $e 0 }}{{ fail (printf "%s is no whole number of bytes" $text) }}{{ end }}
{{- range until 6 }}{{ if and (gt $n 0) (eq (mod $n 1024) 0) (lt $power 6) }}{{ $n = div $n 1024 }}{{ $power = add $power 1 }}{{ end }}{{ end }}
{{- if gt $power 0 }}
{{- $suffix = index (list "" "Ki" "Mi" "Gi" "Ti" "Pi" "Ei") $power }}
{{- else if lt $n 1024 }}
{{- $suffix = "" }}
{{- end }}
{{- if eq $n 0 }}0{{ else if or (gt $power 0) (ge $n 1024) }}{{ $n }}{{ ternary $suffix "" (gt $power 0) }}{{ else }}{{ include "backpack.decimal" (dict "n" $n "e" 0) }}{{ end }}
{{- else }}
{{- $e = add $e (get (dict "" 0 "m" -3 "k" 3 "M" 6 "G" 9 "T" 12 "P" 15 "E" 18) $suffix) }}
{{- include "backpack.decimal" (dict "n" $n "e" $e) }}
{{- end }}
{{- end }}

{{- /* n · 10^e, the exponent one of 18, 15, … -9 */ -}}
{{- define "backpack.decimal" -}}
{{- $n := .n }}{{ $e := .e }}
{{- range until 20 }}{{ if and (gt $n 0) (eq (mod $n 10) 0) }}{{ $n = div $n 10 }}{{ $e = add $e 1 }}{{ end }}{{ end }}
{{- range until 20 }}{{ if or (ne (mod $e 3) 0) (gt $e 18) }}{{ $n = mul $n 10 }}{{ $e = sub $e 1 }}{{ end }}{{ end }}
{{- if lt $e -9 }}{{ fail (printf "%de%d is finer than a billionth" $n $e) }}{{ end }}
{{- if eq $n 0 }}0{{ else }}{{ $n }}{{ index (list "n" "u" "m" "" "k" "M" "G" "T" "P" "E") (int (div (add $e 9) 3)) }}{{ end }}
{{- end }}
