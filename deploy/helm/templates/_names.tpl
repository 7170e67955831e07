{{- /* Prefix of every object's name: the release's name, unless values override it. */ -}}
{{- define "backpack.prefix" -}}
{{- with .Values.fullnameOverride }}{{ . }}{{ else }}
{{- with .Values.nameOverride }}{{ $.Release.Name }}-{{ . }}{{ else }}{{ .Release.Name }}{{ end }}
{{- end }}
{{- end }}

{{- define "backpack.name" -}}{{ printf "%s-%s" (include "backpack.prefix" .root) .part | trunc 60 | trimSuffix "-" }}{{- end }}

{{- define "backpack.selector" -}}
app.kubernetes.io/name: {{ .root.Values.nameOverride | default "backpack" }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end }}

{{- define "backpack.labels" -}}
{{ include "backpack.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* Annotations of an object that is no pod: `own` of the object, and those of all objects. */ -}}
{{- define "backpack.annotations" -}}
{{- with merge (deepCopy (.own | default dict)) .root.Values.commonAnnotations }}
annotations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* How dashboard and alerts tell this one from others that the same Prometheus watches. */ -}}
{{- define "backpack.installation" -}}{{ .Release.Namespace }}/{{ .Release.Name }}{{- end }}

{{- define "backpack.image" -}}
{{- $own := .values.image }}
{{- $repository := print ($own.registry | default .root.Values.image.registry) ($own.repository | default (printf "backpack-%s" .part)) }}
{{- if $own.digest }}{{ $repository }}@{{ $own.digest }}
{{- else }}{{ $repository }}:{{ $own.tag | default .root.Values.image.tag | default .root.Chart.AppVersion }}
{{- end }}
{{- end }}

{{- define "backpack.pullPolicy" -}}{{ .values.image.pullPolicy | default .root.Values.image.pullPolicy }}{{- end }}

{{- /* Environment of one process: what the chart decides, then the operator's settings, then secrets by reference. */ -}}
{{- define "backpack.environment" -}}
{{- $own := .own | default dict }}
{{- $tls := .root.Values.tls }}
{{- $_ := set $own "drain" .root.Values.drainSeconds }}
{{- if $tls.secret }}
{{- $_ := merge $own (dict "tls_certificate" "/tls/tls.crt" "tls_key" "/tls/tls.key" "tls_ca" "/tls/ca.crt" "tls_name" $tls.name) }}
{{- if has .part $tls.clientCertificates }}{{ $_ := set $own "tls_client_ca" "/tls/ca.crt" }}{{ end }}
{{- end }}
{{- /* toJson: toString would write large numbers as 6.7e+07. */ -}}
{{- range $name, $value := merge (deepCopy $own) .root.Values.settings }}
{{- $text := kindIs "string" $value | ternary $value (toJson $value) }}
- {name: BACKPACK_{{ $name | upper }}{{ with $text }}, value: {{ . | quote }}{{ end }}}
{{- end }}
{{- if and .root.Values.model.claim (not .hook) }}
- {name: BACKPACK_MODEL, value: {{ printf "/models/%s" .root.Values.model.path | trimSuffix "/" | quote }}}
{{- end }}
{{- range $setting, $key := .secrets }}
- name: {{ $setting }}
  valueFrom: {secretKeyRef: {name: {{ $.root.Values.secret }}, key: {{ get $.root.Values.secretKeys $key }}}}
{{- end }}
{{- end }}

{{- define "backpack.mounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: state, mountPath: /var/lib/backpack}
{{- if .root.Values.model.claim }}
- {name: model, mountPath: /models, readOnly: true}
{{- end }}
{{- if .root.Values.tls.secret }}
- {name: tls, mountPath: /tls, readOnly: true}
{{- end }}
{{- with .values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "backpack.volumes" -}}
- {name: tmp, emptyDir: {}}
- {name: state, emptyDir: {}}
{{- if .root.Values.model.claim }}
- name: model
  persistentVolumeClaim: {claimName: {{ .root.Values.model.claim }}, readOnly: true}
{{- end }}
{{- with .root.Values.tls.secret }}
- name: tls
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- with .values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* What calls PostgreSQL has its authorities, if they are given. */ -}}
{{- define "backpack.databaseMounts" -}}
{{- if .root.Values.database.authorities }}
- {name: database, mountPath: /database, readOnly: true}
{{- end }}
{{- end }}

{{- define "backpack.databaseVolumes" -}}
{{- with .root.Values.database.authorities }}
- name: database
  configMap: {name: {{ . }}}
{{- end }}
{{- end }}

{{- /* Kubernetes goes on sending connections for a moment after it has decided to stop a pod. */ -}}
{{- define "backpack.lifecycle" -}}
preStop:
  exec: {command: [sleep, "5"]}
{{- end }}

{{- /* The pause above, then the drain, then those that were told to retry. */ -}}
{{- define "backpack.graceSeconds" -}}
{{ add 5 .root.Values.drainSeconds 15 }}
{{- end }}

{{- /* An eviction may always take pods that aren't ready: otherwise gateways without replicas would hold up a node's drain. */ -}}
{{- define "backpack.budget" -}}
{{- $budget := .values.podDisruptionBudget }}
{{- if not (kindIs "invalid" $budget.minAvailable) }}
minAvailable: {{ $budget.minAvailable }}
{{- else }}
maxUnavailable: {{ $budget.maxUnavailable }}
{{- end }}
unhealthyPodEvictionPolicy: {{ $budget.unhealthyPodEvictionPolicy }}
{{- end }}
